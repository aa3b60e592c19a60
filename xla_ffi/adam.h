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

#include "portable.h"
#include "ratio.h"

namespace paged_optax {

// Number of float32 hyperparameters that reach a step as an operand: b1, b2, eps, eps_root.
inline constexpr int kNumHyperparams = 4;

// What becomes of an element whose gradient is not finite; its moments stay in any case.
enum class BadElement : int8_t { kNan, kSkip };

struct AdamStep {
  float b1, b2, eps, eps_root;
  float one_minus_b1, one_minus_b2;
  // The bias-corrected first moment is mu * mu_scale + grad * grad_scale; the second nu * nu_scale.
  float mu_scale, grad_scale, nu_scale;
  // In place of the first moment of an element whose gradient is not finite: NaN, or 0 to skip it.
  float bad_mu_hat;
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
  step.ratio_phase = RatioPhase(count);
  return step;
}

// Square root and reciprocal as the host rounds them. The GPU has a faster twin, fast_math.h.
struct IeeeMath {
  PAGED_HD float Sqrt(float x) { return std::sqrt(x); }
  PAGED_HD float Reciprocal(float x) { return 1.0f / x; }
};

// Advances the moments of one element and returns the bias-corrected first moment. A gradient that
// would make a moment non-finite gives NaN, or 0, and leaves the moments as they were.
PAGED_HD float AdvanceMoments(const AdamStep& step, float grad, float* mu, float* nu) {
  const float new_mu = step.b1 * *mu + step.one_minus_b1 * grad;
  const float new_nu = step.b2 * *nu + step.one_minus_b2 * grad * grad;
  // NaN fails the comparison. If nu is finite, so is grad, and then mu, a mean of finite numbers.
  const bool finite = new_nu <= 3.40282347e38f;
  const float mu_hat = new_mu * step.mu_scale + grad * step.grad_scale;
  *mu = Select(finite, new_mu, *mu);
  *nu = Select(finite, new_nu, *nu);
  return Select(finite, mu_hat, step.bad_mu_hat);
}

// The update of one element (the direction, before the learning rate).
template <class Math>
PAGED_HD float Update(Math& math, const AdamStep& step, float mu_hat, float nu) {
  const float root = math.Sqrt(nu * step.nu_scale + step.eps_root);
  return mu_hat * math.Reciprocal(root + step.eps);
}

}  // namespace paged_optax
