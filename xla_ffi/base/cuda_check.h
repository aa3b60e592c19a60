// CUDA_CHECK and the device guard, for every file that calls the CUDA runtime.
#pragma once

#include <cuda_runtime_api.h>

#include <cerrno>
#include <string>

#include "base/faults.h"
#include "base/status.h"

namespace paged_optax {

// A CUDA call that failed.
class CudaError : public StatusError {
 public:
  using StatusError::StatusError;
};

[[noreturn]] inline void ThrowCudaError(cudaError_t error, const char* call, const char* file,
                                        int line) {
  (void)cudaGetLastError();  // a failed call must not be reported a second time by the next one
  const bool out_of_memory = error == cudaErrorMemoryAllocation;
  throw CudaError(out_of_memory ? StatusCode::kResourceExhausted : StatusCode::kInternal,
                  std::string("CUDA call failed: ") + cudaGetErrorString(error) + " (" +
                      cudaGetErrorName(error) + " of " + call + ", " + file + ":" +
                      std::to_string(line) + ")");
}

// __FILE__ without the folders above the room.
constexpr const char* RoomAndFile(const char* path) {
  const char *room = path, *file = path;
  for (const char* c = path; *c != '\0'; ++c) {
    if (*c != '/') continue;
    room = file;
    file = c + 1;
  }
  return room;
}

// Every call of CUDA is written as PAGED_CUDA or CUDA_CHECK, so that a test build can make it fail
// (base/faults.h).
#define PAGED_CUDA(call) (PAGED_FAILS(#call) ? static_cast<cudaError_t>(errno) : (call))

#define CUDA_CHECK(call)                                                                           \
  do {                                                                                             \
    const cudaError_t cuda_check_error = PAGED_CUDA(call);                                         \
    if (cuda_check_error != cudaSuccess) {                                                         \
      ::paged_optax::ThrowCudaError(cuda_check_error, #call, ::paged_optax::RoomAndFile(__FILE__), \
                                    __LINE__);                                                     \
    }                                                                                              \
  } while (0)

// kernel<<<...>>>(...), checked. An error that an earlier call left, and that nobody asked about,
// is not one of the launch.
#define CUDA_LAUNCH(...)                                                             \
  do {                                                                               \
    if (PAGED_FAILS("launch")) {                                                     \
      ::paged_optax::ThrowCudaError(cudaErrorLaunchOutOfResources, "a launch",       \
                                    ::paged_optax::RoomAndFile(__FILE__), __LINE__); \
    }                                                                                \
    (void)cudaGetLastError();                                                        \
    __VA_ARGS__;                                                                     \
    const cudaError_t cuda_launch_error = cudaGetLastError();                        \
    if (cuda_launch_error != cudaSuccess) {                                          \
      ::paged_optax::ThrowCudaError(cuda_launch_error, "a launch",                   \
                                    ::paged_optax::RoomAndFile(__FILE__), __LINE__); \
    }                                                                                \
  } while (0)

// Makes `device` current for the calling thread and restores the former one. A thread that has
// never used CUDA reports GPU 0 as current. Restoring it would create a context there (hundreds of
// MiB), so such a thread stays on `device`.
class ScopedDevice {
 public:
  explicit ScopedDevice(int device) {
    CUDA_CHECK(cudaGetDevice(&saved_));
    if (saved_ == device) return;
    restore_ = HasContext(saved_);
    CUDA_CHECK(cudaSetDevice(device));
  }
  ScopedDevice(const ScopedDevice&) = delete;
  ~ScopedDevice() {
    if (restore_) (void)PAGED_CUDA(cudaSetDevice(saved_));
  }

 private:
  static bool HasContext(int device) {
    using GetState = int (*)(int device, unsigned* flags, int* active);
    static const GetState get_state = [] {
      void* function = nullptr;
      cudaDriverEntryPointQueryResult result;
      const cudaError_t error = PAGED_CUDA(cudaGetDriverEntryPointByVersion(
          "cuDevicePrimaryCtxGetState", &function, 7000, cudaEnableDefault, &result));
      if (error != cudaSuccess) (void)cudaGetLastError();
      return reinterpret_cast<GetState>(error == cudaSuccess ? function : nullptr);
    }();
    unsigned flags = 0;
    int active = 0;
    // A device's number is also its handle in the driver, and there 0 is success.
    return get_state == nullptr || get_state(device, &flags, &active) != 0 || active != 0;
  }

  int saved_ = 0;
  bool restore_ = false;
};

}  // namespace paged_optax
