// The stand-in for managed memory: pinned host memory that the GPU maps, for all of a state, and
// plain device memory for its resident segments. See memory.h.
#include <cuda_runtime_api.h>

#include <utility>
#include <vector>

#include "base/cuda_check.h"
#include "base/device_buffer.h"
#include "memory/memory.h"
#include "memory/preflight.h"
#include "memory/promises.h"

namespace paged_optax {
namespace {

// Device memory for segments, where the device can from a pool of its own: freeing it there does
// not stop the device. Some virtual GPUs, for which this file is there, have no pools.
class Pool {
 public:
  explicit Pool(int device) {
    int has_pools = 0;
    CUDA_CHECK(cudaDeviceGetAttribute(&has_pools, cudaDevAttrMemoryPoolsSupported, device));
    if (!has_pools) return;
    cudaMemPoolProps properties{};
    properties.allocType = cudaMemAllocationTypePinned;
    properties.location.type = cudaMemLocationTypeDevice;
    properties.location.id = device;
    CUDA_CHECK(cudaMemPoolCreate(&pool_, &properties));
  }
  Pool(const Pool&) = delete;
  ~Pool() {
    if (pool_ != nullptr) (void)PAGED_CUDA(cudaMemPoolDestroy(pool_));
  }

  uint8_t* Allocate(int64_t nbytes, Stream stream) {
    void* data = nullptr;
    if (pool_ == nullptr) {
      CUDA_CHECK(cudaMalloc(&data, nbytes));
    } else {
      CUDA_CHECK(cudaMallocFromPoolAsync(&data, nbytes, pool_, stream));
    }
    return static_cast<uint8_t*>(data);
  }

  void Free(uint8_t* data, Stream stream) {
    (void)(pool_ == nullptr ? PAGED_CUDA(cudaFree(data)) : PAGED_CUDA(cudaFreeAsync(data, stream)));
  }

  // Gives back what is not in use.
  void Trim() {
    if (pool_ != nullptr) CUDA_CHECK(cudaMemPoolTrimTo(pool_, 0));
  }

 private:
  cudaMemPool_t pool_ = nullptr;
};

class PinnedMemory final : public Memory {
 public:
  PinnedMemory(const Geometry& geometry, int device)
      : Memory(geometry),
        device_(device),
        pool_(device),
        host_(geometry.NumBytes()),
        copies_(geometry.NumSegments(), nullptr),
        resident_(geometry.NumSegments(), false) {}

  ~PinnedMemory() override {
    try {
      ScopedDevice scope(device_);
      for (uint8_t* copy : copies_) {
        if (copy != nullptr) (void)PAGED_CUDA(cudaFree(copy));
      }
    } catch (const StatusError&) {  // CUDA does not work any more
    }
  }

  MemoryKind kind() const override { return MemoryKind::kPinned; }
  std::shared_ptr<const void> Pin(std::shared_ptr<void> bytes, int64_t nbytes) const override {
    return std::make_shared<const PinnedBytes>(std::move(bytes), nbytes, device_);
  }
  bool ChangesAddresses() const override { return true; }

  uint8_t* Address(int32_t slot, int32_t segment) const override {
    return resident_[segment] ? copies_[segment] + slot * Length(segment)
                              : Host(host_.device(), slot, segment);
  }

  void Prepare(const Move& move, Stream stream) override {
    if (move.to == Tier::kHost) return;
    ScopedDevice scope(device_);
    int32_t k = move.first;
    try {
      for (; k < move.first + move.count; ++k) {
        if (copies_[k] != nullptr) continue;  // left by a move that failed at its end
        copies_[k] = pool_.Allocate(Length(k) * geometry().num_slots, stream);
      }
    } catch (...) {
      while (k-- > move.first) Free(k, stream);
      throw;
    }
  }

  void Enqueue(const Move& move, Stream stream) override {
    ScopedDevice scope(device_);
    const bool is_in = move.to == Tier::kDevice;
    for (int32_t k = move.first; k < move.first + move.count; ++k) {
      for (int32_t slot = 0; slot < geometry().num_slots; ++slot) {
        uint8_t* host = Host(host_.host(), slot, k);
        uint8_t* copy = copies_[k] + slot * Length(k);
        CUDA_CHECK(cudaMemcpyAsync(is_in ? copy : host, is_in ? host : copy, Length(k),
                                   is_in ? cudaMemcpyHostToDevice : cudaMemcpyDeviceToHost,
                                   stream));
      }
    }
  }

  void Publish(const Move& move) noexcept override {
    for (int32_t k = move.first; k < move.first + move.count; ++k) {
      resident_[k] = move.to == Tier::kDevice;
    }
  }

  void Abandon(const Move& move, Stream stream) noexcept override {
    if (move.to == Tier::kHost) return;
    try {
      ScopedDevice scope(device_);
      for (int32_t k = move.first; k < move.first + move.count; ++k) Free(k, stream);
    } catch (const StatusError&) {  // they stay for the next move
    }
  }

  void Finish(const Move& move, Stream stream) override {
    if (move.to == Tier::kDevice) return;
    ScopedDevice scope(device_);
    for (int32_t k = move.first; k < move.first + move.count; ++k) Free(k, stream);
    CUDA_CHECK(cudaStreamSynchronize(stream));
    pool_.Trim();
  }

  // A new state's segments, whose contents do not count yet.
  void PlaceFirst(int32_t num_resident, Stream stream) {
    const Move move{0, num_resident, Tier::kDevice};
    Prepare(move, stream);
    Publish(move);
  }

 private:
  int64_t Length(int32_t segment) const {
    return geometry().Offset(segment + 1) - geometry().Offset(segment);
  }

  uint8_t* Host(void* base, int32_t slot, int32_t segment) const {
    return static_cast<uint8_t*>(base) + slot * geometry().slot_bytes + geometry().Offset(segment);
  }

  void Free(int32_t segment, Stream stream) {
    if (copies_[segment] == nullptr) return;
    pool_.Free(copies_[segment], stream);
    copies_[segment] = nullptr;
  }

  void Copy(const void* source, int64_t nbytes, void* destination) const override {
    ScopedDevice scope(device_);
    CUDA_CHECK(cudaMemcpy(destination, source, nbytes, cudaMemcpyDefault));
  }

  const int device_;
  Pool pool_;
  MappedBuffer host_;
  std::vector<uint8_t*> copies_;  // on the device: one slot after the other
  std::vector<bool> resident_;
};

}  // namespace

std::unique_ptr<Memory> MakePinnedMemory(const Geometry& geometry, int device, int32_t num_resident,
                                         Stream stream) {
  const HostPromise promise(geometry.NumBytes());  // until the memory is taken
  CheckAddressSpace(geometry.NumBytes());
  ScopedDevice scope(device);
  auto memory = std::make_unique<PinnedMemory>(geometry, device);
  memory->PlaceFirst(num_resident, stream);
  return memory;
}

}  // namespace paged_optax
