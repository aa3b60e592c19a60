// Scratch memory of a call on a GPU: of XLA's pool, or where that is full, of CUDA.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <optional>
#include <string>

#include "base/cuda_check.h"
#include "base/status.h"
#include "xla/ffi/api/ffi.h"

namespace paged_optax {

// XLA may give a program all that is left of its pool, so that there is no room for a few kilobytes
// in it. XLA looks for it for ten seconds then, in each step. So once that has happened on a
// device, CUDA is asked first.
class Scratch {
 public:
  Scratch(::xla::ffi::ScratchAllocator& pool, size_t nbytes, int device, cudaStream_t stream)
      : device_(device), stream_(stream) {
    std::atomic<bool>& is_full = IsFull(device);
    if (is_full && TakeOfCuda(nbytes)) return;
    const auto found =
        PAGED_FAILS("XLA's pool") ? std::nullopt : pool.Allocate(nbytes, alignof(std::max_align_t));
    if (found.has_value()) {
      data_ = *found;
      return;
    }
    if (!is_full && TakeOfCuda(nbytes)) {
      is_full = true;
      return;
    }
    throw StatusError(StatusCode::kResourceExhausted,
                      "a step needs " + std::to_string(nbytes) +
                          " bytes of scratch memory, and neither XLA's pool nor the rest of the "
                          "GPU has them. Lower XLA_PYTHON_CLIENT_MEM_FRACTION a little, or train "
                          "on shorter sequences");
  }
  Scratch(const Scratch&) = delete;
  ~Scratch() {  // once the kernels before it are done
    if (is_of_cuda_ && PAGED_CUDA(cudaFreeAsync(data_, stream_)) != cudaSuccess) Forget();
  }

  void* data() const { return data_; }

 private:
  static std::atomic<bool>& IsFull(int device) {
    static std::array<std::atomic<bool>, 64> is_full{};
    return is_full[static_cast<size_t>(device) % is_full.size()];
  }

  bool TakeOfCuda(size_t nbytes) {
    const ScopedDevice scope(device_);
    is_of_cuda_ = PAGED_CUDA(cudaMallocAsync(&data_, nbytes, stream_)) == cudaSuccess;
    if (!is_of_cuda_) Forget();
    return is_of_cuda_;
  }

  static void Forget() { (void)cudaGetLastError(); }  // so that no launch finds it

  int device_;
  cudaStream_t stream_;
  void* data_ = nullptr;
  bool is_of_cuda_ = false;
};

}  // namespace paged_optax
