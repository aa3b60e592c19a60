// One mean of gradients: what Lion, momentum and their like do.
//
//   direction = p m + q g, or its sign
//   m' = a m + c g
#pragma once

#include "rules/rule.h"

namespace paged_optax {

struct Momentum {
  static constexpr Role kRoles[] = {Role::kSigned};
  static constexpr bool kHasInitial = false;

  struct Coefficients {
    float p, q, a, c;
    bool takes_sign;
    uint32_t unusable;    // bits of the smallest gradient that is unusable
    float bad_direction;  // of an element whose gradient is: NaN, or 0 to skip the element
  };

  PAGED_HD static Coefficients Make(float p, float q, float a, float c, bool takes_sign,
                                    bool is_valid, BadElement bad) {
    return {p, q, a, c, takes_sign, is_valid ? kUnusableGrad : 0, BadDirection(is_valid, bad)};
  }

  template <int K, class Math, class Block>
  PAGED_HD static BitRange Advance(Math, const Coefficients& c, float (&values)[K],
                                   float (&states)[1][K], Block) {
    if (c.takes_sign) {
      AdvanceAs<true>(c, values, states[0]);
    } else {
      AdvanceAs<false>(c, values, states[0]);
    }
    return {0, 0};  // no state that is never negative
  }

 private:
  template <bool kTakesSign, int K>
  PAGED_HD static void AdvanceAs(const Coefficients& c, float (&values)[K], float (&mu)[K]) {
    PAGED_UNROLL
    for (int k = 0; k < K; ++k) {
      const float grad = values[k];
      const bool is_used = (BitsOf(grad) & 0x7fffffffu) < c.unusable;
      const float mean = c.p * mu[k] + c.q * grad;
      const float direction = kTakesSign ? SignOf(mean) : mean;
      mu[k] = Select(is_used, c.a * mu[k] + c.c * grad, mu[k]);
      values[k] = Select(is_used, direction, c.bad_direction);
    }
  }

  PAGED_HD static float SignOf(float x) {
    const float one = FloatOf(BitsOf(1.0f) | (BitsOf(x) & 0x80000000u));
    return Select(x == 0.0f, 0.0f, one);
  }
};

}  // namespace paged_optax
