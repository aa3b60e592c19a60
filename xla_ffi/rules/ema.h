// Means of gradients: an exponential moving average, and the momentum of Muon.
//
//   m' = decay m + (1 - decay) g
//
//   ema    direction = m', or m' / (1 - decay^t) with `debias`; its sign with `sign`
//   muon   direction = m' / (1 - beta^t)
//          or, with `nesterov`, beta m' / (1 - beta^(t+1)) + (1 - beta) g / (1 - beta^t)
//
// Sources: K. Jordan, "Muon: An optimizer for hidden layers in neural networks", 2024; J. Bernstein
// et al., "signSGD: Compressed Optimisation for Non-Convex Problems", ICML 2018 (arXiv:1802.04434),
// algorithm 2, for `sign`.
#pragma once

#include "rules/momentum.h"

namespace paged_optax {

struct Ema {
  using Arithmetic = Momentum;
  static constexpr char kName[] = "ema";
  static constexpr std::array kStates = {"ema"};
  static constexpr std::array<HyperparamInfo, 1> kHyperparams = {{{"decay", Domain::kDecay}}};
  static constexpr std::array kFlags = {"debias", "sign"};

  PAGED_HD static Momentum::Coefficients Prepare(const float* hyperparams, int32_t count,
                                                 uint32_t flags, BadElement bad) {
    const float decay = hyperparams[0], rest = 1.0f - decay;
    const int64_t t = static_cast<int64_t>(count) + 1;
    const double bias = (flags & 1) != 0 ? 1.0 - Power(decay, t) : 1.0;
    return Momentum::Make(static_cast<float>(decay / bias), static_cast<float>(rest / bias), decay,
                          rest, /*takes_sign=*/(flags & 2) != 0, IsDecay(decay), bad);
  }
};

struct Muon {
  using Arithmetic = Momentum;
  static constexpr char kName[] = "muon";
  static constexpr std::array kStates = {"mu"};
  static constexpr std::array<HyperparamInfo, 1> kHyperparams = {{{"beta", Domain::kDecay}}};
  static constexpr std::array kFlags = {"nesterov"};

  PAGED_HD static Momentum::Coefficients Prepare(const float* hyperparams, int32_t count,
                                                 uint32_t flags, BadElement bad) {
    const float beta = hyperparams[0], rest = 1.0f - beta;
    const int64_t t = static_cast<int64_t>(count) + 1;
    const double bias = 1.0 - Power(beta, t);
    const bool nesterov = (flags & 1) != 0;
    const double of_mean = nesterov ? beta / (1.0 - Power(beta, t + 1)) : 1.0 / bias;
    const double of_grad = nesterov ? rest / bias : 0.0;
    return Momentum::Make(static_cast<float>(beta * of_mean),
                          static_cast<float>(rest * of_mean + of_grad), beta, rest,
                          /*takes_sign=*/false, IsDecay(beta), bad);
  }
};

}  // namespace paged_optax
