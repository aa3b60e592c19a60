// The `dynamic` 8-bit code for moments: a block of values is stored as one float32 scale (its largest
// magnitude) and one byte per value. Used by the CPU loop and the CUDA kernel; specified in NumPy by
// paged_optax/_reference.py.
//
// Source: T. Dettmers, M. Lewis, S. Shleifer, L. Zettlemoyer, "8-bit Optimizers via Block-wise
// Quantization", ICLR 2022 (arXiv:2110.02861), section 2.2; the rounding of the table is that of
// bitsandbytes, so codes can be exchanged with it.
//
// The map holds 0, 1 and, for each decade 10^(i-6), i = 0..6, the centres of N_i equal bins of
// [0.1, 1] times 10^(i-6), with N_i = 2^i per sign for the first moment (signed) and N_i = 2^(i+1)
// for the second (unsigned). Call the non-negative values, in order, levels. Counting so that decade i
// occupies levels N_i .. 2 N_i - 1 makes both maps one formula: the first moment has levels 0 (the
// value 0) to 128 (the value 1), the second 1 to 256.
#pragma once

#include "portable.h"

namespace paged_optax {

inline constexpr int kDecades = 7;

// Everything that encoding and decoding one kind of moment looks up.
struct DynamicMap {
  float value[256];       // value of a code
  float upper[257];       // largest magnitude that rounds to this level and not to the next
  float slope[kDecades];  // magnitude -> level, within a decade
  float offset[kDecades];
};

struct DynamicMaps {
  DynamicMap mu;  // signed: code 127 + level, or 127 - level for negative values
  DynamicMap nu;  // unsigned: code level - 1
};

namespace internal {

inline constexpr float kPowerOfTen[kDecades] = {1e-6f, 1e-5f, 1e-4f, 1e-3f, 1e-2f, 1e-1f, 1.0f};
inline constexpr double kInversePowerOfTen[kDecades] = {1e6, 1e5, 1e4, 1e3, 1e2, 1e1, 1e0};

// Edge i of n - 1 equal bins of [0.1, 1], rounded as torch.linspace rounds it: from both ends.
constexpr float BinEdge(int i, int n) {
  const float step = (1.0f - 0.1f) / static_cast<float>(n - 1);
  return i < n / 2 ? static_cast<float>(static_cast<double>(0.1f) + static_cast<double>(step) * i)
                   : static_cast<float>(1.0 - static_cast<double>(step) * (n - 1 - i));
}

constexpr float BinCentre(int decade, int bin, int num_bins) {
  const float sum = BinEdge(bin, num_bins + 1) + BinEdge(bin + 1, num_bins + 1);
  return kPowerOfTen[decade] * (sum / 2.0f);
}

// Greatest float below x > 0. Written with integers because std::nextafter is not constexpr.
constexpr float Below(float x) {
  // The exponent of x gives the distance to its neighbour: 2^(e-24) for x in (2^(e-1), 2^e].
  float spacing = 5.9604645e-8f;  // 2^-24, right for x in (0.5, 1]
  for (float top = 0.5f; x <= top; top *= 0.5f) spacing *= 0.5f;
  return x - spacing;
}

// `first_bins` is N_0: 1 for the signed map, 2 for the unsigned one.
constexpr DynamicMap MakeMap(int first_bins) {
  DynamicMap map{};
  float levels[257] = {};
  const int top = first_bins << kDecades;  // the level of the value 1
  for (int decade = 0, bins = first_bins; decade < kDecades; ++decade, bins *= 2) {
    for (int bin = 0; bin < bins; ++bin) levels[bins + bin] = BinCentre(decade, bin, bins);
    // Half a bin low: truncation then gives the level whose value is just below the magnitude, and
    // one comparison with `upper` decides between it and the next. Any rounding here is harmless.
    const double per_bin = bins / 0.9;
    map.slope[decade] = static_cast<float>(kInversePowerOfTen[decade] * per_bin);
    map.offset[decade] = static_cast<float>(bins - 0.1 * per_bin - 0.5);
  }
  levels[top] = 1.0f;
  // Nearest value; a tie goes to the even code, which is the odd level in both maps.
  for (int level = first_bins - 1; level < top; ++level) {
    const float middle = (levels[level] + levels[level + 1]) * 0.5f;
    map.upper[level] = level % 2 == 1 ? middle : Below(middle);
  }
  for (int level = 1; level <= top; ++level) {
    if (first_bins == 2) {
      map.value[level - 1] = levels[level];
    } else {
      map.value[level < 128 ? 127 + level : 255] = levels[level];
      if (level < 128) map.value[127 - level] = -levels[level];
    }
  }
  return map;
}

}  // namespace internal

constexpr DynamicMaps MakeDynamicMaps() { return {internal::MakeMap(1), internal::MakeMap(2)}; }

// Level nearest to `magnitude`, which must lie in [0, 1] up to rounding.
PAGED_HD int NearestLevel(const DynamicMap& map, float magnitude) {
  const int decade = (magnitude >= 1e-6f) + (magnitude >= 1e-5f) + (magnitude >= 1e-4f) +
                     (magnitude >= 1e-3f) + (magnitude >= 1e-2f) + (magnitude >= 1e-1f);
  const int level = static_cast<int>(magnitude * map.slope[decade] + map.offset[decade]);
  return level + (magnitude > map.upper[level] ? 1 : 0);
}

// Factor that brings a block with this scale into [-1, 1]. Below the smallest normal float the
// reciprocal would overflow; such blocks count as zero.
PAGED_HD float InverseScale(float scale) { return scale >= 1.17549435e-38f ? 1.0f / scale : 0.0f; }

// First moments. A negative value never becomes code 127 (zero): the original's sign rule.
PAGED_HD uint8_t EncodeMu(const DynamicMap& map, float value, float inverse_scale) {
  const float x = value * inverse_scale;
  const int level = NearestLevel(map, x < 0 ? -x : x);
  const int negative = level < 1 ? 1 : (level > 127 ? 127 : level);
  return static_cast<uint8_t>(x < 0 ? 127 - negative : 127 + level);
}

// Second moments, value >= 0.
PAGED_HD uint8_t EncodeNu(const DynamicMap& map, float value, float inverse_scale) {
  return static_cast<uint8_t>(NearestLevel(map, value * inverse_scale) - 1);
}

PAGED_HD float Decode(const DynamicMap& map, uint8_t code, float scale) {
  return map.value[code] * scale;
}

}  // namespace paged_optax
