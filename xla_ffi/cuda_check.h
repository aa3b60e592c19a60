// CUDA_CHECK and the device guard. Included by the files that call the CUDA runtime.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "status.h"

namespace paged_optax {

// A CUDA call that failed.
class CudaError : public StatusError {
 public:
  using StatusError::StatusError;
};

[[noreturn]] inline void ThrowCudaError(cudaError_t error, const char* call) {
  (void)cudaGetLastError();  // a failed call must not be reported a second time by the next one
  const bool out_of_memory = error == cudaErrorMemoryAllocation;
  throw CudaError(
      out_of_memory ? StatusCode::kResourceExhausted : StatusCode::kInternal,
      std::string("CUDA call failed: ") + cudaGetErrorString(error) + " (" + call + ")");
}

#define CUDA_CHECK(call)                                      \
  do {                                                        \
    const cudaError_t cuda_check_error = (call);              \
    if (cuda_check_error != cudaSuccess) {                    \
      ::paged_optax::ThrowCudaError(cuda_check_error, #call); \
    }                                                         \
  } while (0)

// Makes `device` current for the calling thread and restores the former one.
class ScopedDevice {
 public:
  explicit ScopedDevice(int device) {
    CUDA_CHECK(cudaGetDevice(&saved_));
    CUDA_CHECK(cudaSetDevice(device));
  }
  ScopedDevice(const ScopedDevice&) = delete;
  ~ScopedDevice() { (void)cudaSetDevice(saved_); }

 private:
  int saved_ = 0;
};

}  // namespace paged_optax
