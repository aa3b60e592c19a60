// Centered RMSprop: gradients over the root of their variance.
//
//   m' = decay m + (1 - decay) g
//   v' = decay v + (1 - decay) g^2
//   direction = g / sqrt(s + eps) with `eps_in_sqrt`, or g / (sqrt(s) + eps), where s = v' - m'^2
//
// With `bias_correction` m' and v' over 1 - decay^t take their places in s. Rounding can make s
// negative; it is 0 then.
//
// Source: A. Graves, "Generating Sequences With Recurrent Neural Networks", 2013
// (arXiv:1308.0850), equations 38 to 40.
#pragma once

#include "rules/root.h"

namespace paged_optax {

struct Centered {
  static constexpr Role kRoles[] = {Role::kSigned, Role::kNonNegative};
  static constexpr bool kHasInitial = true;

  struct Coefficients {
    float decay, rest;  // rest = 1 - decay
    float initial;
    float unbias;         // of m' and v'
    float eps_root, eps;  // of the root of s
    float bad_grad;       // takes the place of an unusable gradient: NaN, or 0 to skip the element
  };

  template <int K, class Math>
  PAGED_HD static BitRange Advance(Math math, const Coefficients& c, float (&values)[K],
                                   float (&states)[2][K]) {
    float (&mu)[K] = states[0], (&nu)[K] = states[1], variance[K];
    PAGED_UNROLL
    for (int k = 0; k < K; ++k) {
      const float grad = values[k];
      const float next_nu = c.decay * nu[k] + c.rest * grad * grad;
      const bool is_used = IsUsed(grad, next_nu);
      mu[k] = Select(is_used, c.decay * mu[k] + c.rest * grad, mu[k]);
      nu[k] = Select(is_used, next_nu, nu[k]);
      values[k] = Select(is_used, grad, c.bad_grad);
      const float mu_hat = mu[k] * c.unbias;
      const float difference = nu[k] * c.unbias - mu_hat * mu_hat;
      variance[k] = Select(difference > 0.0f, difference, 0.0f);
    }
    DivideByRoot(math, {1.0f, c.eps_root, c.eps}, RangeOf(variance), variance, values);
    return RangeOf(nu);
  }

  // Nothing to bound: both decay at one rate, so the mean never outgrows the root.
  template <int K>
  PAGED_HD static void BoundRatios(const Coefficients&, float (&)[2][K]) {}
};

struct StdDev {
  using Arithmetic = Centered;
  static constexpr char kName[] = "stddev";
  static constexpr std::array kStates = {"mu", "nu"};
  static constexpr std::array<HyperparamInfo, 3> kHyperparams = {
      {{"decay", Domain::kDecay},
       {"eps", Domain::kNonNegative},
       {"initial_scale", Domain::kNonNegative}}};
  static constexpr std::array kFlags = {"eps_in_sqrt", "bias_correction"};

  PAGED_HD static Centered::Coefficients Prepare(const float* hyperparams, int32_t count,
                                                 uint32_t flags, BadElement bad) {
    const float decay = hyperparams[0], eps = hyperparams[1], initial = hyperparams[2];
    const bool is_valid = IsDecay(decay) && IsInitial(initial);
    const RootScale root = DecayedRoot(decay, count, /*corrects_bias=*/(flags & 2) != 0, eps,
                                       /*in_sqrt=*/(flags & 1) != 0);
    return {decay,
            is_valid ? 1.0f - decay : FloatOf(kNanBits),
            IsInitial(initial) ? initial : 0.0f,
            root.nu_scale,
            root.eps_root,
            root.eps,
            BadDirection(is_valid, bad)};
  }
};

}  // namespace paged_optax
