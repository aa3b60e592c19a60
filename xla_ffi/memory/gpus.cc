// See gpus.h.
#include "memory/gpus.h"

#include <atomic>

#include "base/status.h"

#if PAGED_OPTAX_CUDA
#include "base/cuda_check.h"
#endif

namespace paged_optax {
namespace {

std::atomic<bool> g_pretend_not_managed{false};

}  // namespace

void PretendNotManaged(bool pretend) { g_pretend_not_managed = pretend; }

#if PAGED_OPTAX_CUDA

namespace {

Gpu Describe(int device) {
  cudaDeviceProp properties;
  CUDA_CHECK(cudaGetDeviceProperties(&properties, device));
  char bus[32] = "";
  CUDA_CHECK(cudaDeviceGetPCIBusId(bus, sizeof(bus), device));
  return {properties.name,
          properties.major,
          properties.minor,
          static_cast<int64_t>(properties.totalGlobalMem),
          properties.concurrentManagedAccess != 0,
          bus};
}

}  // namespace

Gpus FindGpus() {
  Gpus found;
  if (PAGED_CUDA(cudaDriverGetVersion(&found.driver)) != cudaSuccess || found.driver == 0) {
    found.error = "no NVIDIA driver was found";
    return found;
  }
  int count = 0;
  const cudaError_t error = PAGED_CUDA(cudaGetDeviceCount(&count));
  if (error != cudaSuccess) {
    (void)cudaGetLastError();
    found.error = cudaGetErrorString(error);
    return found;
  }
  for (int device = 0; device < count; ++device) found.gpus.push_back(Describe(device));
  return found;
}

int64_t FreeDeviceBytes(int device) {
  ScopedDevice scope(device);
  size_t free = 0, total = 0;
  CUDA_CHECK(cudaMemGetInfo(&free, &total));
  return static_cast<int64_t>(free);
}

std::string WhyNotManaged(int device) {
  int concurrent = 0;
  CUDA_CHECK(cudaDeviceGetAttribute(&concurrent, cudaDevAttrConcurrentManagedAccess, device));
  if (concurrent && !g_pretend_not_managed) return "";
  return "GPU " + std::to_string(device) +
         " has no concurrent managed memory access (Windows, WSL and some virtual GPUs do not)";
}

#else

namespace {

constexpr char kNoCuda[] = "this build has no CUDA code";

}  // namespace

Gpus FindGpus() { return {0, {}, kNoCuda}; }

int64_t FreeDeviceBytes(int) { throw StatusError(StatusCode::kFailedPrecondition, kNoCuda); }

std::string WhyNotManaged(int) { return kNoCuda; }

#endif  // PAGED_OPTAX_CUDA

}  // namespace paged_optax
