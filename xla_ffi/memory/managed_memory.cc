// CUDA managed memory: one range of addresses whose pages lie in the memory of the GPU or of the
// host. The only caller of CUDA's advice and prefetch functions. See memory.h.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <thread>
#include <utility>

#include "base/cuda_check.h"
#include "base/device_buffer.h"
#include "memory/memory.h"
#include "memory/preflight.h"
#include "memory/promises.h"

namespace paged_optax {
namespace {

// Of moments that move while steps run, and of new memory, where nothing has to be copied.
constexpr int64_t kPieceBytes = kChunkBytes, kNewPieceBytes = 8 * kChunkBytes;

#if CUDART_VERSION >= 13000
cudaMemLocation Location(Tier tier, int device) {
  cudaMemLocation location{};
  location.type = tier == Tier::kDevice ? cudaMemLocationTypeDevice : cudaMemLocationTypeHost;
  location.id = tier == Tier::kDevice ? device : 0;
  return location;
}

cudaError_t Prefetch(void* data, int64_t nbytes, Tier tier, int device, cudaStream_t stream) {
  return PAGED_CUDA(
      cudaMemPrefetchAsync(data, nbytes, Location(tier, device), /*flags=*/0, stream));
}
#else
int Location(Tier tier, int device) { return tier == Tier::kDevice ? device : cudaCpuDeviceId; }

cudaError_t Prefetch(void* data, int64_t nbytes, Tier tier, int device, cudaStream_t stream) {
  return PAGED_CUDA(cudaMemPrefetchAsync(data, nbytes, Location(tier, device), stream));
}
#endif

class ManagedMemory final : public Memory {
 public:
  ManagedMemory(const Geometry& geometry, int device)
      : Memory(geometry), device_(device), promise_(geometry.NumBytes()) {
    CheckAddressSpace(geometry.NumBytes());
    ScopedDevice scope(device);
    CUDA_CHECK(cudaMallocManaged(reinterpret_cast<void**>(&data_), geometry.NumBytes(),
                                 cudaMemAttachGlobal));
  }

  ~ManagedMemory() override {
    promise_.End();
    (void)PAGED_CUDA(cudaFree(data_));
  }

  // The new memory is in its place. The driver may send all that is on the device to the host; what
  // is there already has been taken once steps have written it.
  void KeepPromise() {
    promise_.Keep([on_device = on_device_, is_taken = is_taken_, nbytes = geometry().NumBytes()] {
      return *is_taken ? on_device->load() : nbytes;
    });
  }

  std::shared_ptr<std::atomic<bool>> is_taken() const override { return is_taken_; }

  MemoryKind kind() const override { return MemoryKind::kManaged; }
  std::shared_ptr<const void> Pin(std::shared_ptr<void> bytes, int64_t nbytes) const override {
    return std::make_shared<const PinnedBytes>(std::move(bytes), nbytes, device_);
  }

  uint8_t* Address(int32_t slot, int32_t segment) const override {
    return data_ + slot * geometry().slot_bytes + geometry().Offset(segment);
  }

  void Place(const Move& move) {
    const int32_t border = move.to == Tier::kDevice ? move.first + move.count : move.first;
    *on_device_ = geometry().LeadingBytes(border);
    ForEachSlot(move, [&](uint8_t* data, int64_t nbytes) {
      CUDA_CHECK(cudaMemAdvise(data, nbytes, cudaMemAdviseSetPreferredLocation,
                               Location(move.to, device_)));
      // Pages on the host are mapped for the GPU: its accesses cross the link and never fault.
      CUDA_CHECK(cudaMemAdvise(
          data, nbytes,
          move.to == Tier::kHost ? cudaMemAdviseSetAccessedBy : cudaMemAdviseUnsetAccessedBy,
          Location(Tier::kDevice, device_)));
    });
  }

  // Steps may run meanwhile: those that touch a page under way wait for it. In small pieces,
  // because a prefetch holds up every other call of the process to CUDA, such as the launch of a
  // step.
  void Prepare(const Move& move, Stream stream) override { Prepare(move, stream, kPieceBytes); }

  void Prepare(const Move& move, Stream stream, int64_t piece_bytes) {
    try {
      Send(move, stream, piece_bytes);
    } catch (...) {
      // Pages that were sent come back when they are used.
      Place({move.first, move.count, move.to == Tier::kDevice ? Tier::kHost : Tier::kDevice});
      throw;
    }
  }

 private:
  void Send(const Move& move, Stream stream, int64_t piece_bytes) {
    Place(move);
    ForEachSlot(move, [&](uint8_t* data, int64_t nbytes) {
      for (int64_t done = 0; done < nbytes; done += piece_bytes) {
        CUDA_CHECK(
            Prefetch(data + done, std::min(piece_bytes, nbytes - done), move.to, device_, stream));
        // The driver's lock is unfair: pause, so that a launch that waits can take it.
        std::this_thread::sleep_for(std::chrono::microseconds(50));
      }
    });
  }

  template <class F>
  void ForEachSlot(const Move& move, const F& body) {
    const int64_t begin = geometry().Offset(move.first);
    const int64_t nbytes = geometry().Offset(move.first + move.count) - begin;
    if (nbytes == 0) return;
    ScopedDevice scope(device_);
    for (int32_t slot = 0; slot < geometry().num_slots; ++slot) {
      body(data_ + slot * geometry().slot_bytes + begin, nbytes);
    }
  }

  // A copy by the driver leaves resident pages where they are; a plain read or store by the CPU
  // would fault them over to the host one by one.
  void Copy(const void* source, int64_t nbytes, void* destination) const override {
    ScopedDevice scope(device_);
    CUDA_CHECK(cudaMemcpy(destination, source, nbytes, cudaMemcpyDefault));
  }

  const int device_;
  const std::shared_ptr<std::atomic<int64_t>> on_device_ =
      std::make_shared<std::atomic<int64_t>>(0);
  const std::shared_ptr<std::atomic<bool>> is_taken_ = std::make_shared<std::atomic<bool>>(false);
  HostPromise promise_;
  uint8_t* data_ = nullptr;
};

}  // namespace

std::unique_ptr<Memory> MakeManagedMemory(const Geometry& geometry, int device,
                                          int32_t num_resident, Stream stream) {
  // The driver may evict every managed page, so host memory must be there for all of them.
  auto memory = std::make_unique<ManagedMemory>(geometry, device);
  memory->Prepare({0, num_resident, Tier::kDevice}, stream, kNewPieceBytes);
  // The kernel's first write makes pages on the host, ten times as fast as the CPU would.
  memory->Place({num_resident, geometry.NumSegments() - num_resident, Tier::kHost});
  memory->KeepPromise();
  return memory;
}

}  // namespace paged_optax
