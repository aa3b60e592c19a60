// Lion: the sign of a mean of gradients.
//
//   direction = sign(b1 m + (1 - b1) g)
//   m' = b2 m + (1 - b2) g
//
// Source: X. Chen et al., "Symbolic Discovery of Optimization Algorithms", 2023 (arXiv:2302.06675),
// algorithm 2.
#pragma once

#include "rules/momentum.h"

namespace paged_optax {

struct Lion {
  using Arithmetic = Momentum;
  static constexpr char kName[] = "lion";
  static constexpr std::array kStates = {"mu"};
  static constexpr std::array<HyperparamInfo, 2> kHyperparams = {
      {{"b1", Domain::kDecay}, {"b2", Domain::kDecay}}};
  static constexpr std::array<const char*, 0> kFlags = {};

  PAGED_HD static Momentum::Coefficients Prepare(const float* hyperparams, int32_t, uint32_t,
                                                 BadElement bad) {
    const float b1 = hyperparams[0], b2 = hyperparams[1];
    return Momentum::Make(b1, 1.0f - b1, b2, 1.0f - b2, /*takes_sign=*/true,
                          IsDecay(b1) && IsDecay(b2), bad);
  }
};

}  // namespace paged_optax
