// Adam for one element, and the coefficients that one step shares. Used by the CPU loop and the
// CUDA kernel; specified in NumPy by paged_optax/_reference.py.
//
// Source: D. Kingma, J. Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015
// (arXiv:1412.6980), algorithm 1; T. Dozat, "Incorporating Nesterov Momentum into Adam", 2016, for
// `nesterov`.
//
// Every operation is one IEEE float32 rounding (the build forbids contraction to fma), so all
// implementations agree to the last bit.
#pragma once

#include <cmath>

#include "base/portable.h"
#include "formats/ratio.h"

namespace paged_optax {

// Number of float32 hyperparameters that reach a step as an operand: b1, b2, eps, eps_root.
inline constexpr int kNumHyperparams = 4;

// What becomes of an element whose gradient is not finite; its moments stay in any case.
enum class BadElement : int8_t { kNan, kSkip };

inline constexpr uint32_t kLargestFinite = 0x7f7fffff;  // bits; infinity and NaN have greater ones
inline constexpr uint32_t kUnusableGrad = 0x5f800000;   // bits of 2^64, whose square is infinite

struct AdamStep {
  float b1, b2, eps, eps_root;
  float one_minus_b1, one_minus_b2;
  // The bias-corrected first moment is mu * mu_scale + grad * grad_scale; the second nu * nu_scale.
  float mu_scale, grad_scale, nu_scale;
  // In place of the first moment of an element whose gradient is not finite: NaN, or 0 to skip it.
  float bad_mu_hat;
  uint32_t safe_nu;      // bits of a second moment that no unusable gradient leaves below it
  uint32_t ratio_phase;  // of the random bits of ratio.h
};

// base^exponent by squaring, in float64: the same operations, so the same bits, everywhere. float32
// would cost three digits in 1 - b2^t.
PAGED_HD double Power(double base, int64_t exponent) {
  double result = 1.0;
  for (; exponent > 0; exponent >>= 1) {
    if (exponent & 1) result *= base;
    base *= base;
  }
  return result;
}

// `count` is the number of steps already taken; this step is number count + 1.
PAGED_HD AdamStep MakeAdamStep(const float* hyperparams, int32_t count, bool nesterov,
                               BadElement bad_element) {
  AdamStep step;
  step.b1 = hyperparams[0];
  step.b2 = hyperparams[1];
  step.eps = hyperparams[2];
  step.eps_root = hyperparams[3];
  // A decay rate outside [0, 1) can only come from a traced value, a schedule gone wrong. NaN here
  // makes every update NaN and keeps every moment: what is stored stays finite, and nu
  // non-negative.
  const bool is_valid = step.b1 >= 0.0f && step.b1 < 1.0f && step.b2 >= 0.0f && step.b2 < 1.0f;
  step.one_minus_b1 = 1.0f - step.b1;
  step.one_minus_b2 = is_valid ? 1.0f - step.b2 : FloatOf(0x7fc00000u);
  const int64_t t = static_cast<int64_t>(count) + 1;
  const double c1 = 1.0 - Power(step.b1, t);
  const double c2 = 1.0 - Power(step.b2, t);
  if (nesterov) {
    step.mu_scale = static_cast<float>(step.b1 / (1.0 - Power(step.b1, t + 1)));
    step.grad_scale = static_cast<float>(step.one_minus_b1 / c1);
  } else {
    step.mu_scale = static_cast<float>(1.0 / c1);
    step.grad_scale = 0.0f;
  }
  step.nu_scale = static_cast<float>(1.0 / c2);
  // A gradient can be skipped, a bad decay rate not.
  step.bad_mu_hat = is_valid && bad_element == BadElement::kSkip ? 0.0f : FloatOf(0x7fc00000u);
  const float safe_nu = step.one_minus_b2 * 1.8446744e19f * 9.2233720e18f;  // half of 2^128
  step.safe_nu = safe_nu <= 3.40282347e38f ? BitsOf(safe_nu) : kLargestFinite;
  step.ratio_phase = RatioPhase(count);
  return step;
}

// Square root and reciprocal as the host rounds them. The GPU has a faster twin, fast_math.h.
struct IeeeMath {
  PAGED_HD float Sqrt(float x) const { return std::sqrt(x); }
  PAGED_HD float SqrtOrZero(float x) const { return std::sqrt(x); }
  PAGED_HD float Reciprocal(float x) const { return 1.0f / x; }
};

PAGED_HD float NextNu(const AdamStep& step, float grad, float nu) {
  return step.b2 * nu + step.one_minus_b2 * grad * grad;
}

PAGED_HD float NextMu(const AdamStep& step, float grad, float mu) {
  return step.b1 * mu + step.one_minus_b1 * grad;
}

// Bias-corrected. Without Nesterov momentum the second term is 0, and need not be computed.
template <bool kNesterov>
PAGED_HD float MuHat(const AdamStep& step, float mu, float grad) {
  const float mu_hat = mu * step.mu_scale;
  return kNesterov ? mu_hat + grad * step.grad_scale : mu_hat;
}

// Advances the moments of a lane's elements. `values` are gradients on entry and bias-corrected
// first moments on return. A gradient that is not finite, or has no finite square, gives NaN, or 0,
// and leaves the moments as they were. Returns the range of the second moments.
template <int K>
PAGED_HD BitRange AdvanceMoments(const AdamStep& step, float (&values)[K], float (&mu)[K],
                                 float (&nu)[K]) {
  float next_nu[K];
  PAGED_UNROLL
  for (int k = 0; k < K; ++k) next_nu[k] = NextNu(step, values[k], nu[k]);
  const BitRange range = RangeOf(next_nu);
  if (range.largest > step.safe_nu) {
    PAGED_UNROLL
    for (int k = 0; k < K; ++k) {
      const bool is_used = static_cast<int>((BitsOf(values[k]) & 0x7fffffffu) < kUnusableGrad) &
                           static_cast<int>(BitsOf(next_nu[k]) <= kLargestFinite);
      const float next_mu = NextMu(step, values[k], mu[k]);
      const float mu_hat = MuHat<true>(step, next_mu, values[k]);
      mu[k] = Select(is_used, next_mu, mu[k]);
      nu[k] = Select(is_used, next_nu[k], nu[k]);
      values[k] = Select(is_used, mu_hat, step.bad_mu_hat);
    }
    return RangeOf(nu);
  }
  PAGED_UNROLL
  for (int k = 0; k < K; ++k) {
    mu[k] = NextMu(step, values[k], mu[k]);
    nu[k] = next_nu[k];
  }
  if (step.grad_scale != 0.0f) {
    PAGED_UNROLL
    for (int k = 0; k < K; ++k) values[k] = MuHat<true>(step, mu[k], values[k]);
  } else {
    PAGED_UNROLL
    for (int k = 0; k < K; ++k) values[k] = MuHat<false>(step, mu[k], values[k]);
  }
  return range;
}

// The update of one element (the direction, before the learning rate).
template <class Math>
PAGED_HD float Update(Math math, const AdamStep& step, float mu_hat, float nu) {
  const float root = math.SqrtOrZero(nu * step.nu_scale + step.eps_root);
  return mu_hat * math.Reciprocal(root + step.eps);
}

}  // namespace paged_optax
