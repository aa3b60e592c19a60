// Division by the root of a second moment, and which second moments show that all gradients of a
// lane were usable.
#pragma once

#include "rules/rule.h"

namespace paged_optax {

// The divisor is sqrt(nu * nu_scale + eps_root) + eps. nu_scale is at least 1.
struct RootScale {
  float nu_scale, eps_root, eps;
  // Bits of the second moments for which all radicands and divisors are among those that Math
  // computes exactly (FastRange), and whether 0 is another one.
  BitRange exact;
  bool is_exact_at_zero;
};

// No radicand is less than its second moment, or than eps_root. No divisor is less than its root,
// or than eps.
PAGED_HD RootScale MakeRoot(float nu_scale, float eps_root, float eps) {
  constexpr uint32_t kLargestEps = 0x71800000;  // 2^100; bits of negative numbers are greater
  const bool is_usual =
      nu_scale >= 1.0f && BitsOf(eps_root) <= kLargestEps && BitsOf(eps) <= kLargestEps;
  if (!is_usual) return {nu_scale, eps_root, eps, {0xffffffffu, 0}, false};
  return {nu_scale,
          eps_root,
          eps,
          {BitsOf(eps_root) >= FastRange::kLeastRadicand ? 0 : FastRange::kLeastRadicand,
           BitsOf(8.50705917e37f / nu_scale)},  // 2^126
          eps_root == 0.0f && BitsOf(eps) >= FastRange::kLeastDivisor};
}

// That of a second moment which decays: its bias may be corrected, and eps stands within the root
// or next to it.
PAGED_HD RootScale DecayedRoot(float decay, int32_t count, bool corrects_bias, float eps,
                               bool in_sqrt) {
  const double bias = corrects_bias ? 1.0 - Power(decay, static_cast<int64_t>(count) + 1) : 1.0;
  return MakeRoot(static_cast<float>(1.0 / bias), in_sqrt ? eps : 0.0f, in_sqrt ? 0.0f : eps);
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

// Divides `values` by the roots that `root` takes of scaled second moments, and eps.
template <int K, class Math, class Root>
PAGED_HD void DivideBy(Math math, const RootScale& c, const float (&nu)[K], Root root,
                       float (&values)[K]) {
  PAGED_UNROLL
  for (int k = 0; k < K; ++k) values[k] *= math.Reciprocal(root(nu[k] * c.nu_scale) + c.eps);
}

// Divides `values`. `range` is that of the second moments of the lane, or of its block. What need
// not be added is not: an eps_root of 0, and what keeps the root of 0 finite.
template <int K, class Math>
PAGED_HD void DivideByRoot(Math math, const RootScale& c, BitRange range, const float (&nu)[K],
                           float (&values)[K]) {
  if constexpr (!Math::kIsTotal) {
    if (range.least >= c.exact.least && range.largest <= c.exact.largest) {
      if (c.eps_root == 0.0f) {
        DivideBy(math, c, nu, [&](float x) { return math.Sqrt(x); }, values);
      } else {
        DivideBy(math, c, nu, [&](float x) { return math.Sqrt(x + c.eps_root); }, values);
      }
      return;
    }
    const bool is_exact = c.is_exact_at_zero && range.largest <= c.exact.largest &&
                          LeastWhereNonZero(nu, nu) >= c.exact.least;
    if (!is_exact) return DivideByRoot(IeeeMath(), c, range, nu, values);
  }
  DivideBy(math, c, nu, [&](float x) { return math.SqrtOrZero(x + c.eps_root); }, values);
}

}  // namespace paged_optax
