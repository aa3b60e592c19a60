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

#include "rules/rule.h"

namespace paged_optax {

struct Adam {
  static constexpr char kName[] = "adam";
  static constexpr StateInfo kStates[] = {{"mu", Role::kSigned}, {"nu", Role::kNonNegative}};
  static constexpr HyperparamInfo kHyperparams[] = {{"b1", Domain::kDecay},
                                                    {"b2", Domain::kDecay},
                                                    {"eps", Domain::kNonNegative},
                                                    {"eps_root", Domain::kNonNegative}};
  static constexpr std::array kFlags = {"nesterov"};

  struct Coefficients {
    float b1, b2, eps, eps_root;
    float one_minus_b1, one_minus_b2;
    // The bias-corrected moments are mu * mu_scale + grad * grad_scale and nu * nu_scale.
    float mu_scale, grad_scale, nu_scale;
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
    c.eps = hyperparams[2];
    c.eps_root = hyperparams[3];
    // A decay rate outside [0, 1) can only come from a traced value, such as a schedule gone wrong.
    // NaN here makes every update NaN and keeps every moment: what is stored stays finite, and nu
    // non-negative.
    const bool is_valid = c.b1 >= 0.0f && c.b1 < 1.0f && c.b2 >= 0.0f && c.b2 < 1.0f;
    c.one_minus_b1 = 1.0f - c.b1;
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
    c.nu_scale = static_cast<float>(1.0 / c2);
    // A gradient can be skipped, a bad decay rate cannot.
    c.bad_mu_hat = is_valid && bad == BadElement::kSkip ? 0.0f : FloatOf(kNanBits);
    const float safe_nu = c.one_minus_b2 * 1.8446744e19f * 9.2233720e18f;  // half of 2^128
    c.safe_nu = safe_nu <= 3.40282347e38f ? BitsOf(safe_nu) : kLargestFinite;
    c.bounds_ratios = is_valid && c.b1 * c.b1 > c.b2;
    return c;
  }

  template <int K, class Math>
  PAGED_HD static BitRange Advance(Math math, const Coefficients& c, float (&values)[K],
                                   float (&states)[2][K]) {
    const BitRange range = AdvanceMoments(c, values, states[0], states[1]);
    Direct(math, c, range, states[1], values);
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
  // for a lane, of the largest new second moment, and then answered apart from the common path.
  template <int K>
  PAGED_HD static BitRange AdvanceMoments(const Coefficients& c, float (&values)[K], float (&mu)[K],
                                          float (&nu)[K]) {
    float next_nu[K];
    PAGED_UNROLL
    for (int k = 0; k < K; ++k) next_nu[k] = NextNu(c, values[k], nu[k]);
    const BitRange range = RangeOf(next_nu);
    if (range.largest > c.safe_nu) {
      PAGED_UNROLL
      for (int k = 0; k < K; ++k) {
        const bool is_used = static_cast<int>(IsUsable(values[k])) &
                             static_cast<int>(BitsOf(next_nu[k]) <= kLargestFinite);
        const float next_mu = NextMu(c, values[k], mu[k]);
        const float mu_hat = MuHat<true>(c, next_mu, values[k]);
        mu[k] = Select(is_used, next_mu, mu[k]);
        nu[k] = Select(is_used, next_nu[k], nu[k]);
        values[k] = Select(is_used, mu_hat, c.bad_mu_hat);
      }
      return RangeOf(nu);
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

  // `values` are bias-corrected first moments on entry and directions on return. `range` is that of
  // the second moments.
  template <int K, class Math>
  PAGED_HD static void Direct(Math math, const Coefficients& c, BitRange range,
                              const float (&nu)[K], float (&values)[K]) {
    if constexpr (!Math::kIsTotal) {
      if (!IsInRange<Math>(c, range, nu)) return Direct(IeeeMath(), c, range, nu, values);
    }
    PAGED_UNROLL
    for (int k = 0; k < K; ++k) {
      const float root = math.SqrtOrZero(nu[k] * c.nu_scale + c.eps_root);
      values[k] *= math.Reciprocal(root + c.eps);
    }
  }

  // Whether a lane's radicands and divisors are among those that Math computes exactly. No radicand
  // is less than its second moment or, if that is 0, than eps_root; no divisor is less than its
  // root, or than eps.
  template <class Math, int K>
  PAGED_HD static bool IsInRange(const Coefficients& c, BitRange range, const float (&nu)[K]) {
    const bool has_zeros = range.least == 0;
    uint32_t least = range.least;
    if (least < Math::kLeastRadicand) least = LeastWhereNonZero(nu, nu);
    const uint32_t eps = BitsOf(c.eps), eps_root = BitsOf(c.eps_root);
    const bool zeros_in_range =
        eps >= Math::kLeastDivisor && (eps_root == 0 || eps_root >= Math::kLeastRadicand);
    constexpr uint32_t kLargestEps = 0x71800000;  // 2^100; the bits of negative numbers are greater
    const float largest = FloatOf(range.largest) * c.nu_scale + c.eps_root;
    return least >= Math::kLeastRadicand && BitsOf(largest) <= kLargestFinite &&
           eps <= kLargestEps && eps_root <= kLargestEps && (!has_zeros || zeros_in_range);
  }
};

}  // namespace paged_optax
