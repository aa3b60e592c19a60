// In place of xla_ffi/base/fast_math.h: the same ranges, so that the same paths are taken. Outside
// of them it returns what nobody would take for a result, as a GPU might.
#pragma once

#include <cmath>

#include "base/math.h"

namespace paged_optax {

struct FastMath : FastRange {
  static constexpr bool kIsTotal = false;

  float Sqrt(float x) const {
    return BitsOf(x) >= kLeastRadicand && BitsOf(x) < 0x7f800000u ? std::sqrt(x) : kWrong;
  }
  float SqrtOrZero(float x) const { return x == 0.0f ? x : Sqrt(x); }
  float Reciprocal(float x) const {
    return BitsOf(x) >= kLeastDivisor && BitsOf(x) < kDivisorEnd ? 1.0f / x : kWrong;
  }

 private:
  static constexpr float kWrong = -12345.0f;
};

}  // namespace paged_optax
