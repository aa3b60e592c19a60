// Square roots and reciprocals for the GPU, rounded as IEEE 754 asks. The compiler's own versions
// look at every argument and jump to a slow path for unusual ones; these are right within a range
// that a caller checks for a whole lane.
//
// Method: the hardware's approximation and one Newton step whose residual a fused multiply-add
// computes exactly (P. Markstein, "IA-64 and Elementary Functions", 2000, chapters 8 and 9);
// correct to the last bit for all arguments in range, which tests/test_gpu.py checks one by one.
#pragma once

#include "base/math.h"

namespace paged_optax {

struct FastMath : FastRange {
  static constexpr bool kIsTotal = false;

  __device__ __forceinline__ float Sqrt(float x) const { return Sqrt(x, x); }
  // Also exact for 0: the tiny addend vanishes in every other case and keeps rsqrt finite here.
  __device__ __forceinline__ float SqrtOrZero(float x) const {
    return Sqrt(x, x + FloatOf(0x00800000));
  }

  __device__ __forceinline__ float Reciprocal(float x) const {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    const float residual = __fmaf_rn(-x, r, 1.0f);
    return __fmaf_rn(r, residual, r);
  }

 private:
  __device__ __forceinline__ static float Sqrt(float x, float not_zero) {
    float r;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(not_zero));
    const float s = __fmul_rn(x, r);
    const float residual = __fmaf_rn(-s, s, x);
    return __fmaf_rn(residual, __fmul_rn(r, 0.5f), s);
  }
};

}  // namespace paged_optax
