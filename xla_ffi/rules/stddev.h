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
    float unbias;      // of m' and v'
    RootScale root;    // of s
    float bad_grad;    // takes the place of an unusable gradient: NaN, or 0 to skip the element
    uint32_t safe_nu;  // bits: if no new second moment is above it, every gradient was usable
  };

  template <int K, class Math, class Block>
  PAGED_HD static BitRange Advance(Math math, const Coefficients& c, float (&values)[K],
                                   float (&states)[2][K], Block block) {
    const float (&mu)[K] = states[0], (&nu)[K] = states[1];
    const BitRange range = AdvanceStates(c, values, states, block);
    float variance[K];
    PAGED_UNROLL
    for (int k = 0; k < K; ++k) {
      const float mu_hat = mu[k] * c.unbias;
      variance[k] = Max(nu[k] * c.unbias - mu_hat * mu_hat, 0.0f);
    }
    RootScale root = c.root;
    root.nu_scale = 1.0f;  // which a compiler can see here
    DivideByRoot(math, root, RangeOf(variance), variance, values);
    return range;
  }

  // Nothing to bound: both decay at one rate, so the mean never outgrows the root.
  template <int K>
  PAGED_HD static void BoundRatios(const Coefficients&, float (&)[2][K]) {}

 private:
  // Whether a gradient is unusable is asked once for a block, as in adam.h.
  template <int K, class Block>
  PAGED_HD static BitRange AdvanceStates(const Coefficients& c, float (&grads)[K],
                                         float (&states)[2][K], Block block) {
    float (&mu)[K] = states[0], (&nu)[K] = states[1], next_nu[K];
    PAGED_UNROLL
    for (int k = 0; k < K; ++k) next_nu[k] = c.decay * nu[k] + c.rest * grads[k] * grads[k];
    const BitRange range = RangeOf(next_nu, block);
    if (range.largest > c.safe_nu) {
      PAGED_UNROLL
      for (int k = 0; k < K; ++k) {
        const bool is_used = IsUsed(grads[k], next_nu[k]);
        mu[k] = Select(is_used, c.decay * mu[k] + c.rest * grads[k], mu[k]);
        nu[k] = Select(is_used, next_nu[k], nu[k]);
        grads[k] = Select(is_used, grads[k], c.bad_grad);
      }
      return RangeOf(nu, block);
    }
    PAGED_UNROLL
    for (int k = 0; k < K; ++k) {
      mu[k] = c.decay * mu[k] + c.rest * grads[k];
      nu[k] = next_nu[k];
    }
    return range;
  }
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
    const float rest = is_valid ? 1.0f - decay : FloatOf(kNanBits);
    return {decay,
            rest,
            IsInitial(initial) ? initial : 0.0f,
            root.nu_scale,
            MakeRoot(1.0f, root.eps_root, root.eps),
            BadDirection(is_valid, bad),
            SafeNu(rest)};
  }
};

}  // namespace paged_optax
