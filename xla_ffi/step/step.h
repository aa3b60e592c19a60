// One optimizer step over blocks of moments. The arithmetic of a block stands here once, as a
// template over the number of elements that one lane holds; step_cpu.cc (one lane of 256) and
// step_cuda.cu (32 lanes of 8) add only loops, loads and stores.
#pragma once

#include "base/dtype.h"
#include "formats/dynamic.h"
#include "formats/ratio.h"
#include "layout/layout.h"
#include "rules/adam.h"
#include "step/params.h"

namespace paged_optax {

// One leaf of the tree. Gradients and updates share a buffer (the call aliases them) except where
// XLA feeds a slice of something larger, as in a scan over stacked gradients.
struct Leaf {
  const void* grads;
  void* updates;
  int64_t size;         // elements
  int64_t first_block;  // number of its first block among the blocks of its codec
  int64_t first_work;   // number of its first block among all blocks of the call
  DType dtype;          // of gradients and updates
  Codec codec;
  // The rest where the step takes the parameters too.
  DType param_dtype;
  ParamRounding rounding;
  bool decays;  // whether weight decay applies
  const void* params;
  uint64_t key;  // of its random bits
};

// A lane that is a whole block.
struct WholeBlock {
  PAGED_HD uint32_t Max(uint32_t lane_max) const { return lane_max; }
  PAGED_HD uint32_t Min(uint32_t lane_min) const { return lane_min; }
};

// Bias-corrected first moments on entry, updates on return. `range` is that of the second moments.
template <int K>
PAGED_HD void UpdateLane(IeeeMath math, const AdamStep& step, BitRange, const float (&nu)[K],
                         float (&values)[K]) {
  PAGED_UNROLL
  for (int k = 0; k < K; ++k) values[k] = Update(math, step, values[k], nu[k]);
}

// `values` are gradients on entry and updates on return. `block` maps the extremes of a lane's
// elements to those of the block. It compares bit patterns, which order non-negative floats as
// their values do: exact in any order of evaluation.
template <int K, class Math, class Level, class Block>
PAGED_HD void StepDynamicBlock(Math math, const AdamStep& step, const DynamicMaps<Level>& maps,
                               float (&values)[K], uint8_t (&mu_codes)[K], uint8_t (&nu_codes)[K],
                               float& mu_scale, float& nu_scale, Block block) {
  float mu[K], nu[K];
  PAGED_UNROLL
  for (int k = 0; k < K; ++k) {
    mu[k] = Decode(maps.mu, mu_codes[k], mu_scale);
    nu[k] = Decode(maps.nu, nu_codes[k], nu_scale);
  }
  const BitRange range = AdvanceMoments(step, values, mu, nu);
  UpdateLane(math, step, range, nu, values);
  mu_scale = FloatOf(block.Max(BitsOf(LargestMagnitude(mu))));
  nu_scale = FloatOf(block.Max(range.largest));
  const float mu_inverse = InverseScale(mu_scale), nu_inverse = InverseScale(nu_scale);
  PAGED_UNROLL
  for (int k = 0; k < K; ++k) {
    mu_codes[k] = EncodeMu(maps.mu, mu[k], mu_inverse);
    nu_codes[k] = EncodeNu(maps.nu, nu[k], nu_inverse);
  }
}

// The window of a block with these moments. `top` is the block's largest second moment, `least` the
// lane's smallest.
template <int K, class Block>
PAGED_HD RatioWindow FitWindow(const float (&mu)[K], const float (&nu)[K], uint32_t top,
                               uint32_t least, Block block) {
  uint32_t bottom = block.Min(least);
  const bool has_zeros = bottom == 0;
  if (has_zeros) bottom = block.Min(LeastWhereNonZero(nu, nu));
  uint32_t range = top > bottom ? top - bottom : 0;
  if (range > kIdleRange) {
    float active[K];  // 0 where the element has no gradients
    PAGED_UNROLL
    for (int k = 0; k < K; ++k) active[k] = Select(nu[k] == 0.0f, 0.0f, mu[k]);
    bottom = block.Min(LeastWhereNonZero(nu, active));
    const uint32_t active_range = top > bottom ? top - bottom : 0;
    range = active_range > kIdleRange ? active_range : kIdleRange;
  }
  return FitWindow(top, range, has_zeros);
}

// As StepDynamicBlock, for the `ratio` code. `start` is RatioStart of the lane's first element.
// `nu_word` is an integer (RatioWindow::word), in the place of a scale.
template <int K, class Math, class Block>
PAGED_HD void StepRatioBlock(Math math, const AdamStep& step, uint32_t start, float (&values)[K],
                             uint8_t (&mu_codes)[K], uint8_t (&nu_codes)[K], float& mu_scale,
                             float& nu_word, Block block) {
  float mu[K], nu[K];
  DecodeRatioNus(nu_codes, GridOf(BitsOf(nu_word)), nu);
  const float mu_step = MuStep(mu_scale);
  PAGED_UNROLL
  for (int k = 0; k < K; ++k) mu[k] = DecodeRatioMu(mu_codes[k], mu_step, UnitOf(nu[k]));

  const BitRange range = AdvanceMoments(step, values, mu, nu);
  UpdateLane(math, step, range, nu, values);

  uint32_t top = block.Max(range.largest);
  if (top > kLargestNu) {
    top = kLargestNu;
    PAGED_UNROLL
    for (int k = 0; k < K; ++k) {
      nu[k] = Select(BitsOf(nu[k]) < kLargestNu, nu[k], FloatOf(kLargestNu));
    }
  }
  const RatioWindow window = FitWindow(mu, nu, top, range.least, block);
  nu_word = FloatOf(window.word);
  uint32_t random[K];
  PAGED_UNROLL
  for (int k = 0; k < K; ++k) {
    random[k] = start + step.ratio_phase + static_cast<uint32_t>(k) * kRatioStride;
  }
  EncodeRatioNus(window, random, mu, nu, nu_codes);

  PAGED_UNROLL
  for (int k = 0; k < K; ++k) mu[k] *= UnitReciprocalOf(nu[k]);  // the ratio from here on
  mu_scale = FloatOf(block.Max(BitsOf(LargestMagnitude(mu))));
  if (mu_scale > kLargestRatio) {
    PAGED_UNROLL
    for (int k = 0; k < K; ++k) {
      const float above = mu[k] > -kLargestRatio ? mu[k] : -kLargestRatio;
      mu[k] = above < kLargestRatio ? above : kLargestRatio;
    }
    mu_scale = kLargestRatio;
  }
  const float inverse_mu_step = InverseMuStep(math, mu_scale);
  PAGED_UNROLL
  for (int k = 0; k < K; ++k) {
    mu_codes[k] = EncodeRatioMu(math, mu[k], inverse_mu_step, random[k]);
  }
}

template <int K, class Math>
PAGED_HD void StepFloat32Block(Math math, const AdamStep& step, float (&values)[K], float (&mu)[K],
                               float (&nu)[K]) {
  const BitRange range = AdvanceMoments(step, values, mu, nu);
  UpdateLane(math, step, range, nu, values);
}

template <DType kParam, int K>
PAGED_HD void RoundParams(const ParamStep& step, const Leaf& leaf, float decay, int64_t start,
                          const float (&params)[K], uint8_t (&residuals)[K], float (&values)[K]) {
  const RandomKey key = BlockKey(step.key, leaf.key, start);
  const uint32_t first = static_cast<uint32_t>(start);
  if (leaf.rounding == ParamRounding::kCompensated) {
    RoundParams<kParam, true>(step, decay, key, first, leaf.dtype, params, residuals, values);
  } else {
    RoundParams<kParam, false>(step, decay, key, first, leaf.dtype, params, residuals, values);
  }
}

// Directions on entry, updates on return, for a lane that starts at element `start` of the leaf.
template <int K>
PAGED_HD void UpdateParams(const ParamStep& step, const Leaf& leaf, int64_t start,
                           const float (&params)[K], uint8_t (&residuals)[K], float (&values)[K]) {
  const float decay = leaf.decays ? step.weight_decay : 0.0f;
  if (leaf.rounding == ParamRounding::kNone) {
    PAGED_UNROLL
    for (int k = 0; k < K; ++k) values[k] = Change(step, decay, values[k], params[k]);
    return;
  }
  if (leaf.param_dtype == DType::kBFloat16) {
    RoundParams<DType::kBFloat16>(step, leaf, decay, start, params, residuals, values);
  } else {
    RoundParams<DType::kFloat16>(step, leaf, decay, start, params, residuals, values);
  }
}

// Hyperparameters of a step that takes the parameters: learning rate and weight decay follow.
inline constexpr int kNumParamHyperparams = kNumHyperparams + 2;

PAGED_HD ParamStep MakeParamStep(const float* hyperparams, int32_t count) {
  return {-hyperparams[kNumHyperparams], hyperparams[kNumHyperparams + 1], StepKey(count)};
}

// The work of one call: every block of every leaf, numbered 0 .. num_work - 1.
struct Work {
  const Leaf* leaves;
  int64_t num_leaves;
  int64_t num_work;
  const uint8_t* source;  // base of the slot that is read; nullptr for a fresh state's zeros
  uint8_t* target;        // base of the slot that is written; may be the source
  ArenaExtent extent;
  const ParamStep* params;  // nullptr where the step does not take the parameters
};

// Leaf that block number `work` belongs to: the last one that starts at or before it.
PAGED_HD int64_t FindLeaf(const Leaf* leaves, int64_t num_leaves, int64_t work) {
  int64_t low = 0, high = num_leaves;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (leaves[middle].first_work <= work) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// Runs blocks [begin, end) of the work on the calling thread.
void StepBlocksCpu(const AdamStep& step, const Work& work, int64_t begin, int64_t end);

}  // namespace paged_optax
