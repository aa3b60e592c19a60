// Square roots and reciprocals as the host rounds them. fast_math.h is the faster twin of a GPU.
#pragma once

#include <cmath>

#include "base/portable.h"

namespace paged_optax {

// Arguments for which fast_math.h is exact, by their bits.
struct FastRange {
  // Finite radicands from 2^-100 on, below which the residual could underflow.
  static constexpr uint32_t kLeastRadicand = 0x0d800000;
  // Normal divisors below 2^125: neither they nor their reciprocals are subnormal.
  static constexpr uint32_t kLeastDivisor = 0x00800000, kDivisorEnd = 0x7e000000;
};

struct IeeeMath {
  PAGED_HD float Sqrt(float x) const { return std::sqrt(x); }
  PAGED_HD float SqrtOrZero(float x) const { return std::sqrt(x); }
  PAGED_HD float Reciprocal(float x) const { return 1.0f / x; }

  static constexpr bool kIsTotal = true;  // exact for all arguments
};

}  // namespace paged_optax
