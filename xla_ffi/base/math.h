// Square roots and reciprocals as the host rounds them. fast_math.h is the faster twin of a GPU.
#pragma once

#include <cmath>

#include "base/portable.h"

namespace paged_optax {

struct IeeeMath {
  PAGED_HD float Sqrt(float x) const { return std::sqrt(x); }
  PAGED_HD float SqrtOrZero(float x) const { return std::sqrt(x); }
  PAGED_HD float Reciprocal(float x) const { return 1.0f / x; }

  // Bounds of the arguments that are computed exactly: none here.
  static constexpr bool kIsTotal = true;
};

}  // namespace paged_optax
