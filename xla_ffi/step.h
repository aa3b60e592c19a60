// One optimizer step over blocks of moments. The arithmetic of a block stands here once, as a
// template over the number of elements that one lane holds; step_cpu.cc (one lane of 256) and
// step_cuda.cu (32 lanes of 8) add only loops, loads and stores.
#pragma once

#include "adam.h"
#include "codec.h"
#include "dtype.h"
#include "layout.h"
#include "ratio.h"
#include "rounding.h"

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

// Bias-corrected first moments on entry, updates on return.
template <int K>
PAGED_HD void UpdateLane(IeeeMath math, const AdamStep& step, const float (&nu)[K],
                         float (&values)[K]) {
  PAGED_UNROLL
  for (int k = 0; k < K; ++k) values[k] = Update(math, step, values[k], nu[k]);
}

// `values` are gradients on entry and updates on return. `BlockMax` maps the maximum over a lane's
// elements to that over the block. It compares bit patterns, which order non-negative floats as
// their values do: exact in any order of evaluation.
template <int K, class Math, class Level, class BlockMax>
PAGED_HD void StepDynamicBlock(Math math, const AdamStep& step, const DynamicMaps<Level>& maps,
                               float (&values)[K], uint8_t (&mu_codes)[K], uint8_t (&nu_codes)[K],
                               float& mu_scale, float& nu_scale, BlockMax block_max) {
  float mu[K], nu[K];
  uint32_t mu_max = 0, nu_max = 0;
  PAGED_UNROLL
  for (int k = 0; k < K; ++k) {
    mu[k] = Decode(maps.mu, mu_codes[k], mu_scale);
    nu[k] = Decode(maps.nu, nu_codes[k], nu_scale);
  }
  PAGED_UNROLL
  for (int k = 0; k < K; ++k) values[k] = AdvanceMoments(step, values[k], &mu[k], &nu[k]);
  UpdateLane(math, step, nu, values);
  PAGED_UNROLL
  for (int k = 0; k < K; ++k) {
    const uint32_t mu_bits = BitsOf(mu[k]) & 0x7fffffffu, nu_bits = BitsOf(nu[k]);
    mu_max = mu_bits > mu_max ? mu_bits : mu_max;
    nu_max = nu_bits > nu_max ? nu_bits : nu_max;
  }
  mu_scale = FloatOf(block_max(mu_max));
  nu_scale = FloatOf(block_max(nu_max));
  const float mu_inverse = InverseScale(mu_scale), nu_inverse = InverseScale(nu_scale);
  PAGED_UNROLL
  for (int k = 0; k < K; ++k) {
    mu_codes[k] = EncodeMu(maps.mu, mu[k], mu_inverse);
    nu_codes[k] = EncodeNu(maps.nu, nu[k], nu_inverse);
  }
}

// The same for the `ratio` code. `start` is RatioStart of the lane's first element. `nu_word` is an
// integer (RatioWindow), in the place of a scale.
template <int K, class Math, class BlockMax>
PAGED_HD void StepRatioBlock(Math math, const AdamStep& step, uint32_t start, float (&values)[K],
                             uint8_t (&mu_codes)[K], uint8_t (&nu_codes)[K], float& mu_scale,
                             float& nu_word, BlockMax block_max) {
  float mu[K], nu[K];
  {
    const RatioWindow window = WindowOf(BitsOf(nu_word));
    const float mu_step = MuStep(mu_scale);
    PAGED_UNROLL
    for (int k = 0; k < K; ++k) {
      nu[k] = DecodeRatioNu(nu_codes[k], window);
      mu[k] = DecodeRatioMu(mu_codes[k], mu_step, UnitOf(nu[k]).unit);
    }
  }
  PAGED_UNROLL
  for (int k = 0; k < K; ++k) values[k] = AdvanceMoments(step, values[k], &mu[k], &nu[k]);
  UpdateLane(math, step, nu, values);

  // Ends of the block's range as maxima: of the bits, and of the negated bits, in which 0 is least.
  uint32_t top = 0, depth = 0, active_depth = 0;
  PAGED_UNROLL
  for (int k = 0; k < K; ++k) {
    const uint32_t bits = BitsOf(nu[k]), negated = 0u - bits;
    const uint32_t active = Select(mu[k] == 0.0f, 0u, negated);
    top = bits > top ? bits : top;
    depth = negated > depth ? negated : depth;
    active_depth = active > active_depth ? active : active_depth;
  }
  const uint32_t word = WindowWord(block_max(top), block_max(depth), block_max(active_depth));
  nu_word = FloatOf(word);

  const RatioWindow window = WindowOf(word);
  uint32_t random[K], mu_max = 0;
  PAGED_UNROLL
  for (int k = 0; k < K; ++k) {
    random[k] = start + step.ratio_phase + static_cast<uint32_t>(k) * kRatioStride;
    const RatioNu stored = EncodeRatioNu(BitsOf(nu[k]), window, random[k]);
    nu_codes[k] = stored.code;
    // The ratio from here on.
    mu[k] = Select(nu[k] == 0.0f, 0.0f, mu[k] * UnitOf(FloatOf(stored.bits)).reciprocal);
    const uint32_t mu_bits = BitsOf(mu[k]) & 0x7fffffffu;
    mu_max = mu_bits > mu_max ? mu_bits : mu_max;
  }
  mu_max = block_max(mu_max);
  mu_scale = FloatOf(mu_max < kLargestRatioBits ? mu_max : kLargestRatioBits);
  const float inverse_mu_step = InverseMuStep(mu_scale);
  PAGED_UNROLL
  for (int k = 0; k < K; ++k) mu_codes[k] = EncodeRatioMu(mu[k], inverse_mu_step, random[k]);
}

template <int K, class Math>
PAGED_HD void StepFloat32Block(Math math, const AdamStep& step, float (&values)[K], float (&mu)[K],
                               float (&nu)[K]) {
  PAGED_UNROLL
  for (int k = 0; k < K; ++k) values[k] = AdvanceMoments(step, values[k], &mu[k], &nu[k]);
  UpdateLane(math, step, nu, values);
}

template <DType kParam, int K>
PAGED_HD void RoundParams(const ParamStep& step, const Leaf& leaf, float decay, int64_t start,
                          const float (&params)[K], uint8_t (&residuals)[K], float (&values)[K]) {
  const RandomKey key = BlockKey(step.key, leaf.key, /*stream=*/0, start);
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
