// What an optimizer is to this library: a rule for one element, in float32. A rule knows its states
// and hyperparameters and nothing of how states are stored (formats/) or what leaves the step
// (step/params.h). rules.h lists them; lion.h is the shortest.
//
// A rule is a struct with
//
//   Arithmetic                             what a step does to an element
//   kName, kStates, kHyperparams, kFlags   what it is called and what it takes; kStates are names,
//                                          one for each role of the arithmetic
//   static Arithmetic::Coefficients Prepare(const float* hyperparams, int32_t count,
//                                           uint32_t flags, BadElement bad)
//
// Prepare sees the hyperparameters in the order of kHyperparams and the number of steps taken
// before; it runs once a step, in float64 where digits would be lost.
//
// Optimizers that differ in their coefficients alone share an arithmetic. Steps and kernels are
// compiled for each arithmetic, so a rule more costs a function. An arithmetic is a struct with
//
//   kRoles         of its states, in order (base/roles.h)
//   kHasInitial    whether its state that is never negative starts at something else than 0
//   Coefficients   what all elements of a step share
//   static BitRange Advance<K>(math, coefficients, values, states, block)
//
// Advance takes a lane of K elements: `values` are gradients on entry and directions on return
// (before the learning rate), `states` become the next ones. It returns the range, in the block, of
// the state that is never negative, if there is one. An element whose gradient is unusable keeps
// its states. What is rare is best asked of a block's extremes: on a GPU all threads of a warp then
// go the same way, and need not be brought together again.
//
// With kHasInitial the coefficients have a member `initial`: at the first step, that state of every
// element has this value.
//
// One whose state may be anything (Role::kAny) has no Advance: its values come from XLA.
//
// An arithmetic with states of both roles also has
//
//   static void BoundRatios<K>(coefficients, states)
//
// for formats that store the others relative to the root of the one that is never negative: it
// takes back what would leave the others of a block no precision.
#pragma once

#include <array>

#include "base/math.h"
#include "base/roles.h"

namespace paged_optax {

// The values that a hyperparameter may have.
enum class Domain : int8_t {
  kDecay,        // of a mean: [0, 1)
  kNonNegative,  // finite
};

struct HyperparamInfo {
  const char* name;
  Domain domain;
};

// What becomes of an element whose gradient is unusable; its states stay in either case.
enum class BadElement : int8_t {
  kNan,   // its direction is NaN
  kSkip,  // its direction is 0
};

inline constexpr uint32_t kLargestFinite = 0x7f7fffff;  // bits; infinity and NaN have greater ones
// Bits of 2^64. A gradient of this size and more is unusable: its square is infinite.
inline constexpr uint32_t kUnusableGrad = 0x5f800000;
inline constexpr uint32_t kNanBits = 0x7fc00000;

PAGED_HD bool IsUsable(float grad) { return (BitsOf(grad) & 0x7fffffffu) < kUnusableGrad; }

// A decay rate outside [0, 1) can only come from a traced value, such as a schedule gone wrong. A
// rule then makes every direction NaN and keeps every state, so that what is stored stays finite.
PAGED_HD bool IsDecay(float rate) { return rate >= 0.0f && rate < 1.0f; }

// The same for the value at which a state starts.
PAGED_HD bool IsInitial(float value) { return value >= 0.0f && BitsOf(value) <= kLargestFinite; }

// The direction of an element whose gradient is unusable. It can be skipped, a bad decay rate
// cannot.
PAGED_HD float BadDirection(bool is_valid, BadElement bad) {
  return is_valid && bad == BadElement::kSkip ? 0.0f : FloatOf(kNanBits);
}

// base^exponent by squaring, in float64: the same operations, so the same bits, everywhere. float32
// would cost three digits in 1 - b2^t.
PAGED_HD double Power(double base, int64_t exponent) {
  double result = 1.0;
  for (; exponent > 0; exponent >>= 1) {
    if (exponent & 1) result *= base;
    base *= base;
  }
  return result;
}

template <class Rule>
inline constexpr int kNumHyperparams = static_cast<int>(Rule::kHyperparams.size());

}  // namespace paged_optax
