// See device_buffer.h.
#include "base/device_buffer.h"

#include <cuda_runtime_api.h>

#include <cstring>
#include <utility>

#include "base/cuda_check.h"

namespace paged_optax {

DeviceBuffer::DeviceBuffer(int64_t nbytes) {
  CUDA_CHECK(cudaMalloc(&data_, nbytes));
  try {
    CUDA_CHECK(cudaMemset(data_, 0, nbytes));
  } catch (...) {
    (void)PAGED_CUDA(cudaFree(data_));
    throw;
  }
}

DeviceBuffer::~DeviceBuffer() { (void)PAGED_CUDA(cudaFree(data_)); }

MappedBuffer::MappedBuffer(int64_t nbytes) {
  CUDA_CHECK(cudaHostAlloc(&host_, nbytes, cudaHostAllocMapped | cudaHostAllocPortable));
  std::memset(host_, 0, nbytes);
  try {
    CUDA_CHECK(cudaHostGetDevicePointer(&device_, host_, 0));
  } catch (...) {
    (void)PAGED_CUDA(cudaFreeHost(host_));
    throw;
  }
}

MappedBuffer::~MappedBuffer() { (void)PAGED_CUDA(cudaFreeHost(host_)); }

PinnedBytes::PinnedBytes(std::shared_ptr<void> bytes, int64_t nbytes, int device) {
  const ScopedDevice scope(device);
  if (PAGED_CUDA(cudaHostRegister(bytes.get(), nbytes, cudaHostRegisterPortable)) == cudaSuccess) {
    bytes_ = std::move(bytes);
  } else {
    (void)cudaGetLastError();  // the next call must not report it
  }
}

PinnedBytes::~PinnedBytes() {
  if (bytes_ == nullptr || PAGED_CUDA(cudaHostUnregister(bytes_.get())) == cudaSuccess) return;
  (void)cudaGetLastError();
  // Kept for good: for the driver this memory stays pinned, and it refuses to copy other memory
  // that has a part of it.
  (void)new std::shared_ptr<void>(std::move(bytes_));
}

}  // namespace paged_optax
