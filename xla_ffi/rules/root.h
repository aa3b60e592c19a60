// Division by the root of a second moment, and which second moments show that all gradients of a
// lane were usable.
#pragma once

#include "rules/rule.h"

namespace paged_optax {

// The divisor is sqrt(nu * nu_scale + eps_root) + eps. nu_scale is at least 1.
struct RootScale {
  float nu_scale, eps_root, eps;
};

// That of a second moment which decays: its bias may be corrected, and eps stands within the root
// or next to it.
PAGED_HD RootScale DecayedRoot(float decay, int32_t count, bool corrects_bias, float eps,
                               bool in_sqrt) {
  const double bias = corrects_bias ? 1.0 - Power(decay, static_cast<int64_t>(count) + 1) : 1.0;
  return {static_cast<float>(1.0 / bias), in_sqrt ? eps : 0.0f, in_sqrt ? 0.0f : eps};
}

// Bits: if no new second moment is above it, every gradient was usable. `weight` is that of a
// squared gradient in them.
PAGED_HD uint32_t SafeNu(float weight) {
  const float safe = weight * 1.8446744e19f * 9.2233720e18f;  // half of 2^128
  return safe <= 3.40282347e38f ? BitsOf(safe) : kLargestFinite;
}

// Whether a gradient and its new second moment may be used.
PAGED_HD bool IsUsed(float grad, float next_nu) {
  return static_cast<int>(IsUsable(grad)) & static_cast<int>(BitsOf(next_nu) <= kLargestFinite);
}

inline constexpr uint32_t kLargestEps = 0x71800000;  // 2^100; bits of negative numbers are greater

// Whether a lane's radicands and divisors are among those that Math computes exactly. No radicand
// is less than its second moment or, if that is 0, than eps_root; no divisor is less than its
// root, or than eps.
template <class Math, int K>
PAGED_HD bool IsInRange(const RootScale& c, BitRange range, const float (&nu)[K]) {
  const bool has_zeros = range.least == 0;
  uint32_t least = range.least;
  if (least < Math::kLeastRadicand) least = LeastWhereNonZero(nu, nu);
  const uint32_t eps = BitsOf(c.eps), eps_root = BitsOf(c.eps_root);
  const bool zeros_in_range =
      eps_root == 0 ? eps >= Math::kLeastDivisor : eps_root >= Math::kLeastRadicand;
  const float largest = FloatOf(range.largest) * c.nu_scale + c.eps_root;
  return least >= Math::kLeastRadicand && BitsOf(largest) <= kLargestFinite && eps <= kLargestEps &&
         eps_root <= kLargestEps && (!has_zeros || zeros_in_range);
}

// Whether a lane is like almost all of them where eps_root is 0: in range, and without zeros. An
// addend of 0 need not be added then.
template <class Math>
PAGED_HD bool IsUsual(const RootScale& c, BitRange range) {
  return BitsOf(c.eps_root) == 0 && BitsOf(c.eps) <= kLargestEps &&
         range.least >= Math::kLeastRadicand &&
         BitsOf(FloatOf(range.largest) * c.nu_scale) <= kLargestFinite;
}

// Divides `values`. `range` is that of the second moments.
template <int K, class Math>
PAGED_HD void DivideByRoot(Math math, const RootScale& c, BitRange range, const float (&nu)[K],
                           float (&values)[K]) {
  if constexpr (!Math::kIsTotal) {
    if (IsUsual<Math>(c, range)) {
      PAGED_UNROLL
      for (int k = 0; k < K; ++k) {
        values[k] *= math.Reciprocal(math.Sqrt(nu[k] * c.nu_scale) + c.eps);
      }
      return;
    }
    if (!IsInRange<Math>(c, range, nu)) return DivideByRoot(IeeeMath(), c, range, nu, values);
  }
  PAGED_UNROLL
  for (int k = 0; k < K; ++k) {
    const float root = math.SqrtOrZero(nu[k] * c.nu_scale + c.eps_root);
    values[k] *= math.Reciprocal(root + c.eps);
  }
}

}  // namespace paged_optax
