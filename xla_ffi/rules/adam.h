// Adam.
//
//   m' = b1 m + (1 - b1) g
//   v' = b2 v + (1 - b2) g^2
//   direction = (m' / (1 - b1^t)) / (sqrt(v' / (1 - b2^t) + eps_root) + eps)
//
// Source: D. Kingma, J. Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015
// (arXiv:1412.6980), algorithm 1; T. Dozat, "Incorporating Nesterov Momentum into Adam", 2016, for
// `nesterov`.
//
// Every operation is one IEEE float32 rounding (the build forbids contraction to fma), so all
// implementations agree to the last bit.
#pragma once

#include "rules/root.h"

namespace paged_optax {

struct Adam {
  using Arithmetic = Adam;
  static constexpr char kName[] = "adam";
  static constexpr std::array kStates = {"mu", "nu"};
  static constexpr Role kRoles[] = {Role::kSigned, Role::kNonNegative};
  static constexpr bool kHasInitial = false;
  static constexpr std::array<HyperparamInfo, 4> kHyperparams = {
      {{"b1", Domain::kDecay},
       {"b2", Domain::kDecay},
       {"eps", Domain::kNonNegative},
       {"eps_root", Domain::kNonNegative}}};
  static constexpr std::array kFlags = {"nesterov"};

  struct Coefficients {
    float b1, b2;
    float one_minus_b1, one_minus_b2;
    float mu_scale, grad_scale;  // the bias-corrected mu is mu * mu_scale + grad * grad_scale
    RootScale root;
    // Takes the place of the first moment of an element whose gradient is unusable: NaN, or 0 to
    // skip the element.
    float bad_mu_hat;
    uint32_t safe_nu;    // bits: if no new second moment is above it, every gradient was usable
    bool bounds_ratios;  // b1^2 > b2
  };

  PAGED_HD static Coefficients Prepare(const float* hyperparams, int32_t count, uint32_t flags,
                                       BadElement bad) {
    Coefficients c;
    c.b1 = hyperparams[0];
    c.b2 = hyperparams[1];
    const bool is_valid = IsDecay(c.b1) && IsDecay(c.b2);
    c.one_minus_b1 = 1.0f - c.b1;
    // NaN makes every new second moment NaN, and so every gradient unusable.
    c.one_minus_b2 = is_valid ? 1.0f - c.b2 : FloatOf(kNanBits);
    const int64_t t = static_cast<int64_t>(count) + 1;
    const double c1 = 1.0 - Power(c.b1, t);
    const double c2 = 1.0 - Power(c.b2, t);
    const bool nesterov = (flags & 1) != 0;
    if (nesterov) {
      c.mu_scale = static_cast<float>(c.b1 / (1.0 - Power(c.b1, t + 1)));
      c.grad_scale = static_cast<float>(c.one_minus_b1 / c1);
    } else {
      c.mu_scale = static_cast<float>(1.0 / c1);
      c.grad_scale = 0.0f;
    }
    c.root = MakeRoot(static_cast<float>(1.0 / c2), hyperparams[3], hyperparams[2]);
    c.bad_mu_hat = BadDirection(is_valid, bad);
    c.safe_nu = SafeNu(c.one_minus_b2);
    c.bounds_ratios = is_valid && c.b1 * c.b1 > c.b2;
    return c;
  }

  template <int K, class Math, class Block>
  PAGED_HD static BitRange Advance(Math math, const Coefficients& c, float (&values)[K],
                                   float (&states)[2][K], Block block) {
    const BitRange range = AdvanceMoments(c, values, states[0], states[1], block);
    DivideByRoot(math, c.root, range, states[1], values);
    return range;
  }

  // With b1^2 > b2 the ratio of an idle element's mu to sqrt(nu) grows from step to step, and takes
  // the precision of its block with it. As long as gradients do not shrink, mu^2 is at most nu. So
  // mu^2 above 2 nu belongs to an element whose gradients have stopped, or shrunk a lot: it stands
  // still from here on, until gradients come back.
  template <int K>
  PAGED_HD static void BoundRatios(const Coefficients& c, float (&states)[2][K]) {
    if (!c.bounds_ratios) return;
    PAGED_UNROLL
    for (int k = 0; k < K; ++k) {
      const float mu = states[0][k];
      states[0][k] = Select(mu * mu > 2.0f * states[1][k], 0.0f, mu);
    }
  }

 private:
  PAGED_HD static float NextMu(const Coefficients& c, float grad, float mu) {
    return c.b1 * mu + c.one_minus_b1 * grad;
  }

  PAGED_HD static float NextNu(const Coefficients& c, float grad, float nu) {
    return c.b2 * nu + c.one_minus_b2 * grad * grad;
  }

  // Bias-corrected. Without Nesterov momentum the second term is 0, and need not be computed.
  template <bool kNesterov>
  PAGED_HD static float MuHat(const Coefficients& c, float mu, float grad) {
    const float mu_hat = mu * c.mu_scale;
    return kNesterov ? mu_hat + grad * c.grad_scale : mu_hat;
  }

  // `values` become the bias-corrected first moments. Whether a gradient is unusable is asked once
  // for a block, of the largest new second moment, and then answered apart from the common path.
  template <int K, class Block>
  PAGED_HD static BitRange AdvanceMoments(const Coefficients& c, float (&values)[K], float (&mu)[K],
                                          float (&nu)[K], Block block) {
    float next_nu[K];
    PAGED_UNROLL
    for (int k = 0; k < K; ++k) next_nu[k] = NextNu(c, values[k], nu[k]);
    const BitRange range = RangeOf(next_nu, block);
    if (range.largest > c.safe_nu) {
      PAGED_UNROLL
      for (int k = 0; k < K; ++k) {
        const bool is_used = IsUsed(values[k], next_nu[k]);
        const float next_mu = NextMu(c, values[k], mu[k]);
        const float mu_hat = MuHat<true>(c, next_mu, values[k]);
        mu[k] = Select(is_used, next_mu, mu[k]);
        nu[k] = Select(is_used, next_nu[k], nu[k]);
        values[k] = Select(is_used, mu_hat, c.bad_mu_hat);
      }
      return RangeOf(nu, block);
    }
    PAGED_UNROLL
    for (int k = 0; k < K; ++k) {
      mu[k] = NextMu(c, values[k], mu[k]);
      nu[k] = next_nu[k];
    }
    if (c.grad_scale != 0.0f) {
      PAGED_UNROLL
      for (int k = 0; k < K; ++k) values[k] = MuHat<true>(c, mu[k], values[k]);
    } else {
      PAGED_UNROLL
      for (int k = 0; k < K; ++k) values[k] = MuHat<false>(c, mu[k], values[k]);
    }
    return range;
  }
};

}  // namespace paged_optax
