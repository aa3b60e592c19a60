// See link.h.
#include "memory/link.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <chrono>

#include "base/cuda_check.h"
#include "base/device_buffer.h"

namespace paged_optax {
namespace {

class OwnStream {
 public:
  OwnStream() { CUDA_CHECK(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking)); }
  OwnStream(const OwnStream&) = delete;
  ~OwnStream() { (void)PAGED_CUDA(cudaStreamDestroy(stream_)); }
  operator cudaStream_t() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
};

}  // namespace

LinkRates MeasureLink(int device, int64_t nbytes) {
  ScopedDevice scope(device);
  const DeviceBuffer device_in(nbytes), device_out(nbytes);
  const MappedBuffer host_in(nbytes), host_out(nbytes);
  const OwnStream in, out;
  const auto rate = [&](bool copies_in, bool copies_out) {
    double seconds = 1e30;
    for (int repeat = 0; repeat < 5; ++repeat) {
      CUDA_CHECK(cudaDeviceSynchronize());
      const auto start = std::chrono::steady_clock::now();
      if (copies_in) {
        CUDA_CHECK(
            cudaMemcpyAsync(device_in.data(), host_in.host(), nbytes, cudaMemcpyHostToDevice, in));
      }
      if (copies_out) {
        CUDA_CHECK(cudaMemcpyAsync(host_out.host(), device_out.data(), nbytes,
                                   cudaMemcpyDeviceToHost, out));
      }
      CUDA_CHECK(cudaDeviceSynchronize());
      const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
      seconds = std::min(seconds, taken.count());
    }
    return static_cast<double>(nbytes) / seconds;
  };
  return {rate(true, false), rate(false, true), rate(true, true)};
}

}  // namespace paged_optax
