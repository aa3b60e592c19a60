// What an optimizer is to this library: a rule for one element, in float32. A rule knows its states
// and hyperparameters and nothing of how states are stored (formats/) or what leaves the step
// (step/params.h). rules.h lists them; lion.h is the shortest.
//
// A rule is a struct with
//
//   kName, kStates, kHyperparams, kFlags   what it is called and what it takes
//   Coefficients                           what all elements of a step share
//   static Coefficients Prepare(const float* hyperparams, int32_t count, uint32_t flags,
//                               BadElement bad)
//   static BitRange Advance<K>(math, coefficients, values, states)
//
// Prepare sees the hyperparameters in the order of kHyperparams and the number of steps taken
// before; it runs once a step, in float64 where digits would be lost. Advance takes a lane of K
// elements: `values` are gradients on entry and directions on return (before the learning rate),
// `states` become the next ones. It returns the range of the state that is never negative, if there
// is one. An element whose gradient is unusable keeps its states.
//
// A rule with a state that is never negative also has
//
//   static void BoundRatios<K>(coefficients, states)
//
// for formats that store other states relative to its root: it takes back what would leave the
// others of a block no precision.
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
inline constexpr int kNumHyperparams =
    static_cast<int>(sizeof(Rule::kHyperparams) / sizeof(HyperparamInfo));

}  // namespace paged_optax
