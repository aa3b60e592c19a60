// Momentum: a decaying sum of gradients.
//
//   m' = decay m + g
//   direction = m', or with `nesterov` g + decay m'
//
// Source: I. Sutskever et al., "On the importance of initialization and momentum in deep learning",
// ICML 2013.
#pragma once

#include "rules/momentum.h"

namespace paged_optax {

struct Trace {
  using Arithmetic = Momentum;
  static constexpr char kName[] = "trace";
  static constexpr std::array kStates = {"trace"};
  static constexpr std::array<HyperparamInfo, 1> kHyperparams = {{{"decay", Domain::kDecay}}};
  static constexpr std::array kFlags = {"nesterov"};

  PAGED_HD static Momentum::Coefficients Prepare(const float* hyperparams, int32_t, uint32_t flags,
                                                 BadElement bad) {
    const float decay = hyperparams[0];
    const bool nesterov = (flags & 1) != 0;
    const float p = nesterov ? decay * decay : decay, q = nesterov ? 1.0f + decay : 1.0f;
    return Momentum::Make(p, q, decay, 1.0f, /*takes_sign=*/false, IsDecay(decay), bad);
  }
};

}  // namespace paged_optax
