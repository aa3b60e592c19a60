// See testing.h: the arithmetic that the GPU does in its own way, for every float32.
#include "base/cuda_check.h"
#include "base/device_buffer.h"
#include "base/dtype.h"
#include "base/fast_math.h"
#include "python/testing.h"

namespace paged_optax {
namespace {

constexpr uint32_t kLargestFinite = 0x7f7fffff;

// Counts arguments, out of all 2^32, in the range of FastMath for which it is not exact, or for
// which the GPU rounds to bfloat16 in another way than dtype.h does on a host.
__global__ void CountInexactKernel(unsigned long long* count) {
  const uint64_t stride = static_cast<uint64_t>(gridDim.x) * blockDim.x;
  for (uint64_t bits = blockIdx.x * blockDim.x + threadIdx.x; bits < uint64_t{1} << 32;
       bits += stride) {
    const float x = FloatOf(static_cast<uint32_t>(bits));
    const uint32_t pattern = BitsOf(x);
    const FastMath math;
    const bool has_root =
        pattern == 0 || (pattern >= FastMath::kLeastRadicand && pattern <= kLargestFinite);
    const bool has_reciprocal =
        pattern >= FastMath::kLeastDivisor && pattern < FastMath::kDivisorEnd;
    const bool good_root = !has_root || BitsOf(math.SqrtOrZero(x)) == BitsOf(sqrtf(x));
    const bool good_reciprocal = !has_reciprocal || BitsOf(math.Reciprocal(x)) == BitsOf(1.0f / x);
    const uint32_t raw = static_cast<uint32_t>(bits);
    const uint32_t half = (raw + 0x7fffu + ((raw >> 16) & 1u)) >> 16;
    const bool good_half = x != x || ToBFloat16(x) == half;
    if (!good_root || !good_reciprocal || !good_half) atomicAdd(count, 1ull);
  }
}

}  // namespace

int64_t CountInexact(int device) {
  const ScopedDevice scope(device);
  const DeviceBuffer count(sizeof(int64_t));
  CUDA_LAUNCH(CountInexactKernel<<<1024, 256>>>(static_cast<unsigned long long*>(count.data())));
  int64_t result;
  CUDA_CHECK(cudaMemcpy(&result, count.data(), sizeof(result), cudaMemcpyDeviceToHost));
  return result;
}

}  // namespace paged_optax
