// RMSprop and Adagrad: gradients over the root of their mean square, and of the sum of squares.
//
//   rms   v' = decay v + (1 - decay) g^2
//         direction = g / sqrt(v' + eps) with `eps_in_sqrt`, or g / (sqrt(v') + eps); with
//         `bias_correction` v' / (1 - decay^t) takes the place of v'
//   rss   v' = v + g^2
//         direction = g / sqrt(v' + eps), and 0 where v' = 0
//
// Sources: G. Hinton, "Neural networks for machine learning", lecture 6e, 2012; J. Duchi et al.,
// "Adaptive Subgradient Methods for Online Learning and Stochastic Optimization", JMLR 2011.
#pragma once

#include "rules/squares.h"

namespace paged_optax {

struct Rms {
  using Arithmetic = Squares;
  static constexpr char kName[] = "rms";
  static constexpr std::array kStates = {"nu"};
  static constexpr std::array<HyperparamInfo, 3> kHyperparams = {
      {{"decay", Domain::kDecay},
       {"eps", Domain::kNonNegative},
       {"initial_scale", Domain::kNonNegative}}};
  static constexpr std::array kFlags = {"eps_in_sqrt", "bias_correction"};

  PAGED_HD static Squares::Coefficients Prepare(const float* hyperparams, int32_t count,
                                                uint32_t flags, BadElement bad) {
    const float decay = hyperparams[0], eps = hyperparams[1];
    const RootScale root = DecayedRoot(decay, count, /*corrects_bias=*/(flags & 2) != 0, eps,
                                       /*in_sqrt=*/(flags & 1) != 0);
    return Squares::Make(decay, 1.0f - decay, hyperparams[2], root, /*is_zero_at_zero=*/false,
                         IsDecay(decay), bad);
  }
};

struct Rss {
  using Arithmetic = Squares;
  static constexpr char kName[] = "rss";
  static constexpr std::array kStates = {"sum_of_squares"};
  static constexpr std::array<HyperparamInfo, 2> kHyperparams = {
      {{"initial_accumulator_value", Domain::kNonNegative}, {"eps", Domain::kNonNegative}}};
  static constexpr std::array<const char*, 0> kFlags = {};

  PAGED_HD static Squares::Coefficients Prepare(const float* hyperparams, int32_t, uint32_t,
                                                BadElement bad) {
    const RootScale root = MakeRoot(1.0f, hyperparams[1], 0.0f);
    return Squares::Make(1.0f, 1.0f, hyperparams[0], root, /*is_zero_at_zero=*/true,
                         /*has_valid_decay=*/true, bad);
  }
};

}  // namespace paged_optax
