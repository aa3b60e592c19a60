// One step of one block: the only place that knows rule, format and output together. A template
// over the number of elements that one lane holds: the CPU has one lane of 256 (step_cpu.cc), a GPU
// 32 lanes of 8 (kernel_cuda.h). They add loops, loads and stores.
#pragma once

#include "formats/formats.h"
#include "layout/layout.h"
#include "rules/rules.h"
#include "step/leaf.h"
#include "step/norm.h"

namespace paged_optax {

// What all blocks of a step share. `Rule` is the arithmetic of a rule here and in all that follows.
template <class Rule>
struct StepOf {
  typename Rule::Coefficients rule;
  ParamStep params;  // if the step takes the parameters
  uint32_t dither_phase;
  float grad_scale;  // of every gradient; 1 unless the step clips
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
  bool clips = false;  // by the global norm
};

// `hyperparams` are those of the rule, then those of MakeParamStep if the step takes the
// parameters, then those of ClipScale if it clips. `count` is the number of steps already taken.
template <class Rule>
PAGED_HD StepOf<typename Rule::Arithmetic> PrepareStep(const StepKind& kind,
                                                       const float* hyperparams, int32_t count) {
  StepOf<typename Rule::Arithmetic> step{};
  step.rule = Rule::Prepare(hyperparams, count, kind.flags, kind.bad);
  const float* rest = hyperparams + kNumHyperparams<Rule>;
  if (TakesParams(kind.output)) {
    step.params = MakeParamStep(rest, count);
    rest += kNumParamHyperparams;
  }
  step.grad_scale = kind.clips ? ClipScale(rest[0], rest[1]) : 1.0f;
  step.dither_phase = DitherPhase(count);
  return step;
}

// `values` are gradients on entry and directions on return, for a lane that starts at element
// `start` of the leaf. `num_fresh`: how many of its elements make their first step.
template <class Rule, class Format, int K, class Math, class Tables, class Block>
PAGED_HD void StepBlock(Math math, const StepOf<Rule>& step, const Tables& tables,
                        uint64_t leaf_key, int64_t start, int num_fresh, float (&values)[K],
                        Lane<Rule, Format, K>& lane, Block block) {
  if (step.grad_scale != 1.0f) {
    PAGED_UNROLL
    for (int k = 0; k < K; ++k) values[k] *= step.grad_scale;
  }
  float states[kNumStates<Rule>][K];
  Format::template Decode<Rule>(tables, lane, states);
  if constexpr (Rule::kHasInitial) {
    if (num_fresh != 0) {
      PAGED_UNROLL
      for (int k = 0; k < K; ++k) {
        float& state = states[kNonNegativeState<Rule>][k];
        state = k < num_fresh ? step.rule.initial : state;
      }
    }
  }
  const BitRange range = Rule::Advance(math, step.rule, values, states, block);
  if constexpr (Format::kStoresRatios && kNonNegativeState<Rule> >= 0 && kFirstSigned<Rule> >= 0) {
    Rule::BoundRatios(step.rule, states);
  }
  const Dither random{Format::kIsRandom ? DitherStart(leaf_key, start) + step.dither_phase : 0};
  Format::template Encode<Rule>(math, tables, range, random, values, states, lane, block);
}

template <Output kOutput, DType kParam, bool kCompensated, int K>
PAGED_HD void UpdateHalves(const ParamStep& step, const Leaf& leaf, float decay, int64_t start,
                           const float (&params)[K], uint8_t (&residuals)[K], float (&values)[K]) {
  const RandomKey key = BlockKey(step.key, leaf.key, start);
  RoundParams<kParam, kCompensated>(step, decay, key, static_cast<uint32_t>(start), params,
                                    residuals, values);
  if constexpr (kOutput == Output::kUpdate) {
    SubtractParams<kParam, kCompensated>(leaf.dtype, params, residuals, values);
  }
}

template <Output kOutput, DType kParam, int K>
PAGED_HD void UpdateHalves(const ParamStep& step, const Leaf& leaf, float decay, int64_t start,
                           const float (&params)[K], uint8_t (&residuals)[K], float (&values)[K]) {
  if (leaf.rounding == ParamRounding::kCompensated) {
    UpdateHalves<kOutput, kParam, true>(step, leaf, decay, start, params, residuals, values);
  } else {
    UpdateHalves<kOutput, kParam, false>(step, leaf, decay, start, params, residuals, values);
  }
}

// Directions on entry, updates or new parameters on return. What is stored of a result rounds it to
// nearest, so a new parameter of 16 bits takes no work of its own with ParamRounding::kNearest.
template <Output kOutput, int K>
PAGED_HD void UpdateParams(const ParamStep& step, const Leaf& leaf, int64_t start,
                           const float (&params)[K], uint8_t (&residuals)[K], float (&values)[K]) {
  const float decay = leaf.decays ? step.weight_decay : 0.0f;
  if (leaf.rounding == ParamRounding::kNearest) {
    PAGED_UNROLL
    for (int k = 0; k < K; ++k) {
      const float change = Change(step, decay, values[k], params[k]);
      values[k] = kOutput == Output::kParams ? params[k] + change : change;
    }
    return;
  }
  if (leaf.param_dtype == DType::kBFloat16) {
    UpdateHalves<kOutput, DType::kBFloat16>(step, leaf, decay, start, params, residuals, values);
  } else {
    UpdateHalves<kOutput, DType::kFloat16>(step, leaf, decay, start, params, residuals, values);
  }
}

}  // namespace paged_optax
