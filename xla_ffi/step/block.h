// One step of one block: the only place that knows rule, format and output together. A template
// over the number of elements that one lane holds: the CPU has one lane of 256 (step_cpu.cc), a GPU
// 32 lanes of 8 (kernel_cuda.h). They add loops, loads and stores.
#pragma once

#include "formats/formats.h"
#include "layout/layout.h"
#include "rules/rules.h"
#include "step/leaf.h"

namespace paged_optax {

// What all blocks of a step share. `Rule` is the arithmetic of a rule here and in all that follows.
template <class Rule>
struct StepOf {
  typename Rule::Coefficients rule;
  ParamStep params;  // for Output::kUpdate
  uint32_t dither_phase;
};

// A StepOf one of the rules.
template <class L>
struct AnyStepOf;
template <class... Rule>
struct AnyStepOf<List<Rule...>> {
  alignas(16) unsigned char bytes[LargestSize<StepOf<typename Rule::Arithmetic>...>()];
};
using AnyStep = AnyStepOf<Rules>;

// What a program says of a step, apart from its leaves.
struct StepKind {
  int8_t rule;  // a place in Rules
  Output output;
  uint32_t flags;  // of the rule: bit i for kFlags[i]
  BadElement bad;
};

// `hyperparams` are those of the rule, then those of MakeParamStep for Output::kUpdate. `count` is
// the number of steps already taken.
template <class Rule>
PAGED_HD StepOf<typename Rule::Arithmetic> PrepareStep(const StepKind& kind,
                                                       const float* hyperparams, int32_t count) {
  StepOf<typename Rule::Arithmetic> step{};
  step.rule = Rule::Prepare(hyperparams, count, kind.flags, kind.bad);
  if (kind.output == Output::kUpdate) {
    step.params = MakeParamStep(hyperparams + kNumHyperparams<Rule>, count);
  }
  step.dither_phase = DitherPhase(count);
  return step;
}

// `values` are gradients on entry and directions on return, for a lane that starts at element
// `start` of the leaf. `num_fresh`: how many of its elements make their first step.
template <class Rule, class Format, int K, class Math, class Tables, class Block>
PAGED_HD void StepBlock(Math math, const StepOf<Rule>& step, const Tables& tables,
                        uint64_t leaf_key, int64_t start, int num_fresh, float (&values)[K],
                        Lane<Rule, Format, K>& lane, Block block) {
  float states[kNumStates<Rule>][K];
  Format::template Decode<Rule>(tables, lane, states);
  if constexpr (Rule::kHasInitial) {
    PAGED_UNROLL
    for (int k = 0; k < K; ++k) {
      float& state = states[kNonNegativeState<Rule>][k];
      state = k < num_fresh ? step.rule.initial : state;
    }
  }
  const BitRange range = Rule::Advance(math, step.rule, values, states);
  if constexpr (Format::kStoresRatios && kNonNegativeState<Rule> >= 0 && kFirstSigned<Rule> >= 0) {
    Rule::BoundRatios(step.rule, states);
  }
  const Dither random{Format::kIsRandom ? DitherStart(leaf_key, start) + step.dither_phase : 0};
  Format::template Encode<Rule>(math, tables, range, random, values, states, lane, block);
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

// Directions on entry, updates on return.
template <int K>
PAGED_HD void UpdateParams(const ParamStep& step, const Leaf& leaf, int64_t start,
                           const float (&params)[K], uint8_t (&residuals)[K], float (&values)[K]) {
  const float decay = leaf.decays ? step.weight_decay : 0.0f;
  if (leaf.rounding == ParamRounding::kNearest) {
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

}  // namespace paged_optax
