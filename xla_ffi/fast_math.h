// Square roots and reciprocals for the GPU, rounded as IEEE 754 asks, without a branch for each.
// The compiler's own versions jump to a slow path for unusual arguments, one by one; these only
// note that an argument was unusual, so that a whole lane is computed again, once. Used by
// step_cuda.cu.
//
// Method: the hardware's approximation and one Newton step whose residual a fused multiply-add
// computes exactly (P. Markstein, "IA-64 and Elementary Functions", 2000, chapters 8 and 9);
// correct to the last bit for all arguments that are not noted as unusual, which tests/test_gpu.py
// checks one by one.
#pragma once

#include "portable.h"

namespace paged_optax {

struct FastMath {
  bool is_exact = true;

  __device__ __forceinline__ float Sqrt(float x) {
    float r;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    const float s = __fmul_rn(x, r);
    const float residual = __fmaf_rn(-s, s, x);
    const float root = __fmaf_rn(residual, __fmul_rn(r, 0.5f), s);
    // Below 2^-100 the residual could underflow. Zero is common and would be inf - inf.
    is_exact &= BitsOf(x) - 0x0d800000u <= 0x7f7fffffu - 0x0d800000u || x == 0.0f;
    return x == 0.0f ? 0.0f : root;
  }

  __device__ __forceinline__ float Reciprocal(float x) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    const float residual = __fmaf_rn(-x, r, 1.0f);
    // Normal numbers below 2^125: neither x nor the result is subnormal. Negative ones do not
    // occur.
    is_exact &= BitsOf(x) - 0x00800000u < 0x7e000000u - 0x00800000u;
    return __fmaf_rn(r, residual, r);
  }
};

}  // namespace paged_optax
