// The element types that gradients and updates may have, and their conversion to and from float32
// (round to nearest even).
#pragma once

#include "base/portable.h"

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#endif

namespace paged_optax {

enum class DType : int8_t { kFloat32, kBFloat16, kFloat16 };

PAGED_HD int64_t SizeOf(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

PAGED_HD float FromBFloat16(uint16_t bits) { return FloatOf(static_cast<uint32_t>(bits) << 16); }

PAGED_HD uint16_t ToBFloat16(float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint16_t rounded;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded) : "f"(x));
  return rounded;
#else
  const uint32_t bits = BitsOf(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>(x == x ? rounded : 0x7fc0u);
#endif
}

// Two at once: one instruction on a GPU. `low` takes the lower half.
PAGED_HD uint32_t ToBFloat16Pair(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint32_t rounded;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(rounded) : "f"(high), "f"(low));
  return rounded;
#else
  return static_cast<uint32_t>(ToBFloat16(high)) << 16 | ToBFloat16(low);
#endif
}

PAGED_HD float FromFloat16(uint16_t bits) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(bits));
#else
  // Move exponent and fraction into place and repair the exponent by an exact multiplication with
  // 2^112, which also normalises subnormal halves. Infinity and NaN need the full exponent.
  const uint32_t magnitude = static_cast<uint32_t>(bits & 0x7fffu) << 13;
  const uint32_t finite = BitsOf(FloatOf(magnitude) * FloatOf(0x77800000u));
  const uint32_t special = magnitude | 0x7f800000u;
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  return FloatOf(((bits & 0x7c00u) == 0x7c00u ? special : finite) | sign);
#endif
}

PAGED_HD uint16_t ToFloat16(float x) {
#if defined(__CUDA_ARCH__)
  return x == x ? __half_as_ushort(__float2half_rn(x)) : static_cast<uint16_t>(0x7e00u);
#else
  const uint32_t bits = BitsOf(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Normal halves: rebias the exponent and round the 13 dropped bits to nearest even.
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Subnormal halves (below 2^-14): adding 0.5 aligns the fraction so that the addition rounds.
  const uint32_t subnormal = BitsOf(FloatOf(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;  // 65520 and above round to infinity
  return static_cast<uint16_t>(x == x ? (half | sign) : 0x7e00u);
#endif
}

}  // namespace paged_optax
