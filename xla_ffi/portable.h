// Spelling of "runs on host and device", and the bit casts both sides share. Included by every
// header whose arithmetic is used by the CPU loop and by the CUDA kernel.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define PAGED_HD __host__ __device__ __forceinline__
#else
#define PAGED_HD inline __attribute__((always_inline))
#endif

#if defined(__CUDA_ARCH__)
#define PAGED_UNROLL _Pragma("unroll")
#else
#define PAGED_UNROLL
#endif

namespace paged_optax {

PAGED_HD uint32_t BitsOf(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(x);
#else
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
#endif
}

PAGED_HD float FloatOf(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
#endif
}

// condition ? a : b. On the host without a branch, however the compiler would merge it with others:
// branches keep it from vectorizing a loop.
PAGED_HD uint32_t Select(bool condition, uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  return condition ? a : b;
#else
  const uint32_t mask = 0u - static_cast<uint32_t>(condition);
  return b ^ ((a ^ b) & mask);
#endif
}

PAGED_HD float Select(bool condition, float a, float b) {
#if defined(__CUDA_ARCH__)
  return condition ? a : b;
#else
  return FloatOf(Select(condition, BitsOf(a), BitsOf(b)));
#endif
}

}  // namespace paged_optax
