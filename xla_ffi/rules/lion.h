// Lion: the sign of a mean of gradients.
//
//   direction = sign(b1 m + (1 - b1) g)
//   m' = b2 m + (1 - b2) g
//
// Source: X. Chen et al., "Symbolic Discovery of Optimization Algorithms", 2023 (arXiv:2302.06675),
// algorithm 2.
#pragma once

#include "rules/rule.h"

namespace paged_optax {

struct Lion {
  static constexpr char kName[] = "lion";
  static constexpr StateInfo kStates[] = {{"mu", Role::kSigned}};
  static constexpr HyperparamInfo kHyperparams[] = {{"b1", Domain::kDecay}, {"b2", Domain::kDecay}};
  static constexpr std::array<const char*, 0> kFlags = {};

  struct Coefficients {
    float b1, b2, one_minus_b1, one_minus_b2;
    uint32_t unusable;    // bits of the smallest gradient that is unusable
    float bad_direction;  // of an element whose gradient is: NaN, or 0 to skip the element
  };

  PAGED_HD static Coefficients Prepare(const float* hyperparams, int32_t, uint32_t,
                                       BadElement bad) {
    const float b1 = hyperparams[0], b2 = hyperparams[1];
    // As in adam.h: with a decay rate outside [0, 1) every gradient is unusable, and none skipped.
    const bool is_valid = b1 >= 0.0f && b1 < 1.0f && b2 >= 0.0f && b2 < 1.0f;
    return {b1,
            b2,
            1.0f - b1,
            1.0f - b2,
            is_valid ? kUnusableGrad : 0,
            is_valid && bad == BadElement::kSkip ? 0.0f : FloatOf(kNanBits)};
  }

  template <int K, class Math>
  PAGED_HD static BitRange Advance(Math, const Coefficients& c, float (&values)[K],
                                   float (&states)[1][K]) {
    float (&mu)[K] = states[0];
    PAGED_UNROLL
    for (int k = 0; k < K; ++k) {
      const float grad = values[k];
      const bool is_used = (BitsOf(grad) & 0x7fffffffu) < c.unusable;
      const float mean = c.b1 * mu[k] + c.one_minus_b1 * grad;
      const float one = FloatOf(BitsOf(1.0f) | (BitsOf(mean) & 0x80000000u));
      const float sign = Select(mean == 0.0f, 0.0f, one);
      mu[k] = Select(is_used, c.b2 * mu[k] + c.one_minus_b2 * grad, mu[k]);
      values[k] = Select(is_used, sign, c.bad_direction);
    }
    return {0, 0};  // no state that is never negative
  }
};

}  // namespace paged_optax
