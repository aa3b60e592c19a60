// AdEMAMix: Adam with a second, slow mean of gradients.
//
//   m1' = b1 m1 + (1 - b1) g
//   m2' = b3 m2 + (1 - b3) g
//   v' = b2 v + (1 - b2) g^2
//   direction = (m1' / (1 - b1^t) + alpha m2') / (sqrt(v' / (1 - b2^t) + eps_root) + eps)
//
// Source: M. Pagliardini et al., "The AdEMAMix Optimizer: Better, Faster, Older", 2024
// (arXiv:2409.03137), algorithm 1.
#pragma once

#include "rules/root.h"

namespace paged_optax {

struct TwoMeans {
  static constexpr Role kRoles[] = {Role::kSigned, Role::kSigned, Role::kNonNegative};
  static constexpr bool kHasInitial = false;

  struct Coefficients {
    float b1, b2, b3, alpha;
    float rest1, rest2, rest3;  // 1 - b1, ...
    float fast_scale;           // the bias-corrected fast mean is m1 * fast_scale
    RootScale root;
    float bad_direction;  // of an element whose gradient is unusable: NaN, or 0 to skip it
    uint32_t safe_nu;     // bits: if no new second moment is above it, every gradient was usable
    bool bounds_fast, bounds_slow;  // b1^2 > b2, b3^2 > b2
  };

  template <int K, class Math, class Block>
  PAGED_HD static BitRange Advance(Math math, const Coefficients& c, float (&values)[K],
                                   float (&states)[3][K], Block block) {
    const BitRange range = AdvanceStates(c, values, states, block);
    DivideByRoot(math, c.root, range, states[2], values);
    return range;
  }

  // As in adam.h: an element whose gradients stopped long ago stands still.
  template <int K>
  PAGED_HD static void BoundRatios(const Coefficients& c, float (&states)[3][K]) {
    if (c.bounds_fast) Bound(states[2], states[0]);
    if (c.bounds_slow) Bound(states[2], states[1]);
  }

 private:
  template <int K>
  PAGED_HD static void Bound(const float (&nu)[K], float (&mu)[K]) {
    PAGED_UNROLL
    for (int k = 0; k < K; ++k) mu[k] = Select(mu[k] * mu[k] > 2.0f * nu[k], 0.0f, mu[k]);
  }

  // `values` become the means over which the root divides.
  template <int K, class Block>
  PAGED_HD static BitRange AdvanceStates(const Coefficients& c, float (&values)[K],
                                         float (&states)[3][K], Block block) {
    float (&fast)[K] = states[0], (&slow)[K] = states[1], (&nu)[K] = states[2], next_nu[K];
    PAGED_UNROLL
    for (int k = 0; k < K; ++k) next_nu[k] = c.b2 * nu[k] + c.rest2 * values[k] * values[k];
    const BitRange range = RangeOf(next_nu, block);
    if (range.largest > c.safe_nu) {
      PAGED_UNROLL
      for (int k = 0; k < K; ++k) {
        const bool is_used = IsUsed(values[k], next_nu[k]);
        const float next_fast = c.b1 * fast[k] + c.rest1 * values[k];
        const float next_slow = c.b3 * slow[k] + c.rest3 * values[k];
        fast[k] = Select(is_used, next_fast, fast[k]);
        slow[k] = Select(is_used, next_slow, slow[k]);
        nu[k] = Select(is_used, next_nu[k], nu[k]);
        values[k] = Select(is_used, Mix(c, fast[k], slow[k]), c.bad_direction);
      }
      return RangeOf(nu, block);
    }
    PAGED_UNROLL
    for (int k = 0; k < K; ++k) {
      fast[k] = c.b1 * fast[k] + c.rest1 * values[k];
      slow[k] = c.b3 * slow[k] + c.rest3 * values[k];
      nu[k] = next_nu[k];
      values[k] = Mix(c, fast[k], slow[k]);
    }
    return range;
  }

  PAGED_HD static float Mix(const Coefficients& c, float fast, float slow) {
    return fast * c.fast_scale + c.alpha * slow;
  }
};

struct AdEMAMix {
  using Arithmetic = TwoMeans;
  static constexpr char kName[] = "ademamix";
  static constexpr std::array kStates = {"m1", "m2", "nu"};
  static constexpr std::array<HyperparamInfo, 6> kHyperparams = {
      {{"b1", Domain::kDecay},
       {"b2", Domain::kDecay},
       {"b3", Domain::kDecay},
       {"alpha", Domain::kNonNegative},
       {"eps", Domain::kNonNegative},
       {"eps_root", Domain::kNonNegative}}};
  static constexpr std::array<const char*, 0> kFlags = {};

  PAGED_HD static TwoMeans::Coefficients Prepare(const float* hyperparams, int32_t count, uint32_t,
                                                 BadElement bad) {
    const float b1 = hyperparams[0], b2 = hyperparams[1], b3 = hyperparams[2];
    const bool is_valid = IsDecay(b1) && IsDecay(b2) && IsDecay(b3);
    const int64_t t = static_cast<int64_t>(count) + 1;
    const float rest2 = is_valid ? 1.0f - b2 : FloatOf(kNanBits);
    return {
        b1,
        b2,
        b3,
        hyperparams[3],
        1.0f - b1,
        rest2,
        1.0f - b3,
        static_cast<float>(1.0 / (1.0 - Power(b1, t))),
        MakeRoot(static_cast<float>(1.0 / (1.0 - Power(b2, t))), hyperparams[5], hyperparams[4]),
        BadDirection(is_valid, bad),
        SafeNu(rest2),
        is_valid && b1 * b1 > b2,
        is_valid && b3 * b3 > b2};
  }
};

}  // namespace paged_optax
