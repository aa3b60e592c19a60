// One mean or sum of squared gradients: what RMSprop and Adagrad do.
//
//   v' = a v + c g^2
//   direction = g / (sqrt(v' nu_scale + eps_root) + eps)
#pragma once

#include "rules/root.h"

namespace paged_optax {

struct Squares {
  static constexpr Role kRoles[] = {Role::kNonNegative};
  static constexpr bool kHasInitial = true;

  struct Coefficients {
    float a, c, initial;
    RootScale root;
    float bad_grad;        // takes the place of an unusable gradient: NaN, or 0 to skip the element
    uint32_t safe_nu;      // bits: if no new second moment is above it, every gradient was usable
    bool is_zero_at_zero;  // whether an element without any second moment has the direction 0
  };

  PAGED_HD static Coefficients Make(float a, float c, float initial, const RootScale& root,
                                    bool is_zero_at_zero, bool has_valid_decay, BadElement bad) {
    const bool is_valid = has_valid_decay && IsInitial(initial);
    const float weight = is_valid ? c : FloatOf(kNanBits);
    return {a,
            weight,
            IsInitial(initial) ? initial : 0.0f,
            root,
            BadDirection(is_valid, bad),
            SafeNu(weight),
            is_zero_at_zero && is_valid};
  }

  template <int K, class Math, class Block>
  PAGED_HD static BitRange Advance(Math math, const Coefficients& c, float (&values)[K],
                                   float (&states)[1][K], Block block) {
    float (&nu)[K] = states[0];
    const BitRange range = AdvanceSquares(c, values, nu, block);
    DivideByRoot(math, c.root, range, nu, values);
    if (c.is_zero_at_zero) {
      PAGED_UNROLL
      for (int k = 0; k < K; ++k) values[k] = Select(nu[k] == 0.0f, 0.0f, values[k]);
    }
    return range;
  }

 private:
  // Whether a gradient is unusable is asked once for a block, as in adam.h.
  template <int K, class Block>
  PAGED_HD static BitRange AdvanceSquares(const Coefficients& c, float (&grads)[K], float (&nu)[K],
                                          Block block) {
    float next[K];
    PAGED_UNROLL
    for (int k = 0; k < K; ++k) next[k] = c.a * nu[k] + c.c * grads[k] * grads[k];
    const BitRange range = RangeOf(next, block);
    if (range.largest > c.safe_nu) {
      PAGED_UNROLL
      for (int k = 0; k < K; ++k) {
        const bool is_used = IsUsed(grads[k], next[k]);
        nu[k] = Select(is_used, next[k], nu[k]);
        grads[k] = Select(is_used, grads[k], c.bad_grad);
      }
      return RangeOf(nu, block);
    }
    PAGED_UNROLL
    for (int k = 0; k < K; ++k) nu[k] = next[k];
    return range;
  }
};

}  // namespace paged_optax
