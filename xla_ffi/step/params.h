// How a parameter of 16 bits takes a step that is smaller than its own rounding: by stochastic
// rounding, or with a master weight of which 8 further bits are kept with the states. Specified in
// NumPy by paged_optax/_reference.
//
// A step in place returns the rounded parameter p'. Otherwise it returns an update u in the
// gradient's type. The caller adds p + u in the parameter's type, and the sum should be p' without
// a second rounding. u = p' - p is such a number whenever p' lies between p / 2 and 2 p
// (P. Sterbenz, 1974) or p is 0. Elsewhere, where a step is about as large as its parameter, u is
// p' - p rounded to nearest.
//
// Everything happens on the bits of float32. There a bfloat16 is a number whose last 16 bits are 0.
// A float16 times 2^-112 is one whose last 13 bits are 0, subnormal halves included. Adding to the
// bits moves a number by as many units of its own last place, across binades too.
//
//   stochastic   add a random number below one unit of the last place, then truncate: the expected
//                value is the exact one
//   compensated  the same, but 8 bits further down; then to nearest, and what is left, -128 to 127
//                in units of 2^-8 of the last place, is the residual. Parameter and residual
//                together are the master weight, to the bit.
#pragma once

#include <array>

#include "base/dtype.h"
#include "base/random.h"

namespace paged_optax {

enum class ParamRounding : int8_t { kNearest, kStochastic, kCompensated };
inline constexpr std::array kParamRoundingNames = {"nearest", "stochastic", "compensated"};

inline constexpr uint8_t kZeroResidual = 128;

// Bits of a float32 after those of a 16-bit type.
template <DType kParam>
inline constexpr int kDroppedBits = kParam == DType::kBFloat16 ? 16 : 13;

// To and from numbers whose leading bits are those of the 16-bit type.
template <DType kParam>
PAGED_HD uint32_t AlignedBits(float x) {
  return BitsOf(kParam == DType::kFloat16 ? x * FloatOf(0x07800000u) : x);  // 2^-112
}

template <DType kParam>
PAGED_HD float FromAlignedBits(uint32_t bits) {
  const float x = FloatOf(bits);
  return kParam == DType::kFloat16 ? x * FloatOf(0x77800000u) : x;  // 2^112
}

template <DType kParam>
PAGED_HD float RoundToNearest(float x) {
  return kParam == DType::kFloat16 ? FromFloat16(ToFloat16(x)) : FromBFloat16(ToBFloat16(x));
}

// The multiple of the last place that these bits are, infinite where the type has no such number.
template <DType kParam>
PAGED_HD float FromRoundedBits(uint32_t bits) {
  const float x = FromAlignedBits<kParam>(bits);
  return kParam == DType::kFloat16 ? RoundToNearest<kParam>(x) : x;
}

template <DType kParam>
PAGED_HD float RoundStochastically(float x, uint32_t random) {
  constexpr int kDropped = kDroppedBits<kParam>;
  const uint32_t bits = AlignedBits<kParam>(x) + (random >> (32 - kDropped));
  const float rounded = FromRoundedBits<kParam>(bits & ~((1u << kDropped) - 1));
  return x == x ? rounded : x;
}

// The parameter of a master weight, and the residual.
template <DType kParam>
PAGED_HD float SplitMaster(float master, uint32_t random, uint8_t* residual) {
  constexpr int kDropped = kDroppedBits<kParam>, kUnit = kDropped - 8;
  const uint32_t bits = AlignedBits<kParam>(master) + (random >> (32 - kUnit));
  const uint32_t up = bits + (1u << (kDropped - 1));  // half a unit of the parameter's last place
  *residual = static_cast<uint8_t>(up >> kUnit);
  const float rounded = FromRoundedBits<kParam>(up & ~((1u << kDropped) - 1));
  return master == master ? rounded : master;
}

// Also for a parameter that someone changed since: the result is within one unit of its last place.
// A parameter of 0 has no residual, because nothing would say with which sign.
template <DType kParam>
PAGED_HD float JoinMaster(float param, uint8_t residual) {
  constexpr int kDropped = kDroppedBits<kParam>, kUnit = kDropped - 8;
  const uint32_t bits = AlignedBits<kParam>(param) - (1u << (kDropped - 1)) +
                        (static_cast<uint32_t>(residual) << kUnit);
  return param == 0.0f ? param : FromAlignedBits<kParam>(bits);
}

template <int K>
PAGED_HD void RoundAllToNearest(DType dtype, float (&values)[K]) {
  if (dtype == DType::kBFloat16) {
    PAGED_UNROLL
    for (int k = 0; k < K; ++k) values[k] = RoundToNearest<DType::kBFloat16>(values[k]);
  } else if (dtype == DType::kFloat16) {
    PAGED_UNROLL
    for (int k = 0; k < K; ++k) values[k] = RoundToNearest<DType::kFloat16>(values[k]);
  }
}

// What a step does to all parameters alike.
struct ParamStep {
  float minus_learning_rate, weight_decay;
  RandomKey key;  // of the step
};

// Hyperparameters of a step that takes the parameters: these follow those of the rule.
inline constexpr int kNumParamHyperparams = 2;

PAGED_HD ParamStep MakeParamStep(const float* hyperparams, int32_t count) {
  return {-hyperparams[0], hyperparams[1], StepKey(count)};
}

// The exact change of a parameter.
PAGED_HD float Change(const ParamStep& step, float decay, float direction, float param) {
  return step.minus_learning_rate * (direction + decay * param);
}

// Directions on entry, the new parameters on return, for the elements from number `first` on. The
// residuals, if kept, become those of the new parameters.
template <DType kParam, bool kCompensated, int K>
PAGED_HD void RoundParams(const ParamStep& step, float decay, RandomKey key, uint32_t first,
                          const float (&params)[K], uint8_t (&residuals)[K], float (&values)[K]) {
  PAGED_UNROLL
  for (int k = 0; k < K; ++k) {
    const uint32_t random = RandomBits(key, first + static_cast<uint32_t>(k));
    const float master = kCompensated ? JoinMaster<kParam>(params[k], residuals[k]) : params[k];
    const float exact = master + Change(step, decay, values[k], master);
    values[k] = kCompensated ? SplitMaster<kParam>(exact, random, &residuals[k])
                             : RoundStochastically<kParam>(exact, random);
  }
}

// New parameters on entry, updates of the type `dtype` on return.
template <DType kParam, bool kCompensated, int K>
PAGED_HD void SubtractParams(DType dtype, const float (&params)[K], uint8_t (&residuals)[K],
                             float (&values)[K]) {
  float rounded[K];
  PAGED_UNROLL
  for (int k = 0; k < K; ++k) {
    rounded[k] = values[k];
    values[k] = rounded[k] - params[k];
  }
  RoundAllToNearest(dtype, values);
  if constexpr (kCompensated) {
    PAGED_UNROLL
    for (int k = 0; k < K; ++k) {
      // Where the sum lands elsewhere, the residual would be that of another parameter.
      const float landed = RoundToNearest<kParam>(params[k] + values[k]);
      residuals[k] = landed == rounded[k] ? residuals[k] : kZeroResidual;
    }
  }
}

}  // namespace paged_optax
