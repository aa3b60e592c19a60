// The `dynamic` 8-bit format: a block of a state is stored as one float32 scale (its largest
// magnitude) and one byte per value. Specified in NumPy by paged_optax/_reference.
//
// Source: T. Dettmers, M. Lewis, S. Shleifer, L. Zettlemoyer, "8-bit Optimizers via Block-wise
// Quantization", ICLR 2022 (arXiv:2110.02861), section 2.2; the rounding of the table is that of
// bitsandbytes, so codes can be exchanged with it.
//
// The map holds 0, 1 and, for each decade 10^(i-6), i = 0..6, the centres of N_i equal bins of
// [0.1, 1] times 10^(i-6). There are N_i = 2^i bins per sign in the map of signed states and N_i =
// 2^(i+1) in that of non-negative ones. Call the non-negative values, in order, levels: the signed
// map has levels 0 (the value 0) to 128 (the value 1), the other one 0 to 255.
#pragma once

#include "formats/format.h"

namespace paged_optax {

inline constexpr int kDecades = 7;

// Encoding looks a magnitude's level up by its leading 16 bits (exponent and 7 bits of fraction),
// which is right or one too low, and lets one comparison decide. Magnitudes below 2^-23 are level
// 0, those from 1 on (1 itself, and what rounding makes of it) share the last entry.
inline constexpr uint32_t kFirstPrefix = (127 - 23) << 7;
inline constexpr uint32_t kLastPrefix = 127 << 7;

// Everything that encoding and decoding one kind of state looks up. `Level` is the type of the
// table's entries: a byte where shared memory is short, an int where vector units gather. There a
// gather costs as much as twenty instructions. So the table that is looked up has both what a
// magnitude's level is and from which lower 16 bits on it is the next one: see PackLevel.
template <class Level>
struct DynamicMap {
  float value[256];  // value of a code
  float upper[255];  // largest magnitude that rounds to this level and not to the next
  Level lowest[kLastPrefix - kFirstPrefix + 1];  // lowest level of the magnitudes with this prefix
};

// Whether the entries of a table are those of PackLevel.
template <class Level>
inline constexpr bool kIsPacked = sizeof(Level) == 4;

template <class Level>
struct DynamicMaps {
  DynamicMap<Level> of_signed;        // code 127 + level, or 127 - level for negative values
  DynamicMap<Level> of_non_negative;  // code level
};

namespace internal {

inline constexpr float kPowerOfTen[kDecades] = {1e-6f, 1e-5f, 1e-4f, 1e-3f, 1e-2f, 1e-1f, 1.0f};

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

// The float with these leading 16 bits and zeros after them, for prefixes of [2^-23, 1].
constexpr float WithPrefix(uint32_t prefix) {
  float power = 1.0f;
  for (uint32_t e = prefix >> 7; e < 127; ++e) power *= 0.5f;
  return power * (1.0f + static_cast<float>(prefix & 127) / 128.0f);
}

// The entry for a prefix. When the lower 16 bits of a magnitude are added, the bits above them are
// `level`, or the next one if the magnitude is above `upper`, which is that of the level.
constexpr int32_t PackLevel(int level, float upper, uint32_t prefix) {
  double unit = 1.0 / (1 << 23);  // of a magnitude's last place
  for (uint32_t e = prefix >> 7; e < 127; ++e) unit *= 0.5;
  const double below =
      (static_cast<double>(upper) - static_cast<double>(WithPrefix(prefix))) / unit;
  const int next = below < 0.0 ? 0 : below >= 65536.0 ? 65536 : static_cast<int>(below) + 1;
  return (level << 16) + 65536 - next;
}

// `first_bins` is N_0: 1 for the signed map, 2 for the unsigned one.
template <class Level>
constexpr DynamicMap<Level> MakeMap(int first_bins) {
  const bool is_signed = first_bins == 1;
  DynamicMap<Level> map{};
  float levels[256] = {};  // 0, then the decades
  int top = 1;             // ends up as the level of the value 1
  for (int decade = 0, bins = first_bins; decade < kDecades; ++decade, bins *= 2) {
    for (int bin = 0; bin < bins; ++bin) levels[top++] = BinCentre(decade, bin, bins);
  }
  levels[top] = 1.0f;
  const int zero_code = is_signed ? 127 : 0;
  for (int level = 0; level <= top; ++level) {
    map.value[zero_code + level] = levels[level];
    if (level > 0 && level <= zero_code) map.value[zero_code - level] = -levels[level];
  }
  // Nearest value; a tie goes to the even code.
  for (int level = 0; level < top; ++level) {
    const float middle = (levels[level] + levels[level + 1]) * 0.5f;
    map.upper[level] = (zero_code + level) % 2 == 0 ? middle : Below(middle);
  }
  int level = 0;
  for (uint32_t prefix = kFirstPrefix; prefix <= kLastPrefix; ++prefix) {
    while (level < top && WithPrefix(prefix) > map.upper[level]) ++level;
    // One comparison must do: the next prefix starts at most one level higher.
    const bool is_narrow = level + 1 >= top || WithPrefix(prefix + 1) <= map.upper[level + 1];
    if (!is_narrow) throw "a prefix spans more than two levels";  // fails the build
    const int lowest = level < top ? level : top - 1;
    map.lowest[prefix - kFirstPrefix] = static_cast<Level>(
        kIsPacked<Level> ? PackLevel(lowest, map.upper[lowest], prefix) : lowest);
  }
  return map;
}

}  // namespace internal

template <class Level>
constexpr DynamicMaps<Level> MakeDynamicMaps() {
  return {internal::MakeMap<Level>(1), internal::MakeMap<Level>(2)};
}

// Where in `lowest` the level of a magnitude is found, which must lie in [0, 1] up to rounding.
PAGED_HD uint32_t PlaceOf(float magnitude) {
  const int prefix = static_cast<int>(BitsOf(magnitude) >> 16) - static_cast<int>(kFirstPrefix);
  return static_cast<uint32_t>(prefix < 0 ? 0 : prefix);
}

// The level nearest to a magnitude. `entry` is what `lowest` has in its place.
template <class Level>
PAGED_HD int NearestLevel(const DynamicMap<Level>& map, int entry, float magnitude) {
  if constexpr (kIsPacked<Level>) {
    return (entry + static_cast<int>(BitsOf(magnitude) & 0xffffu)) >> 16;
  }
  return entry + (magnitude > map.upper[entry] ? 1 : 0);
}

// Factor that brings a block with this scale into [-1, 1]. Below the smallest normal float the
// reciprocal would overflow; such blocks count as zero.
PAGED_HD float InverseScale(float scale) { return scale >= 1.17549435e-38f ? 1.0f / scale : 0.0f; }

// The code of a scaled value from the level of its magnitude. A value with its sign bit set never
// takes code 127 (zero): the original's rule. -1 has no code.
PAGED_HD uint8_t SignedCode(float x, int level) {
  // Without branches, for vector units: -1 for negative values, else 0.
  const int sign = static_cast<int32_t>(BitsOf(x)) >> 31;
  const int at_least = level < -sign ? -sign : level;
  const int allowed = at_least < 128 + sign ? at_least : 128 + sign;
  return static_cast<uint8_t>(127 + ((allowed ^ sign) - sign));
}

// The codes of a block's values.
template <bool kIsSigned, class Level, int K>
PAGED_HD void EncodeValues(const DynamicMap<Level>& map, float inverse_scale,
                           const float (&values)[K], uint8_t (&codes)[K]) {
  uint32_t places[K];
  Level entries[K];
  PAGED_UNROLL
  for (int k = 0; k < K; ++k) {
    const float x = values[k] * inverse_scale;
    places[k] = PlaceOf(kIsSigned ? Abs(x) : x);
  }
  LookUp(map.lowest, places, entries);
  PAGED_UNROLL
  for (int k = 0; k < K; ++k) {
    const float x = values[k] * inverse_scale;
    const int level = NearestLevel(map, entries[k], kIsSigned ? Abs(x) : x);
    codes[k] = kIsSigned ? SignedCode(x, level) : static_cast<uint8_t>(level);
  }
}

struct Dynamic {
  static constexpr char kName[] = "dynamic";
  using Code = uint8_t;
  static constexpr int kCodeBits = 8;
  static constexpr int kWordsPerState = 1;  // the scale
  static constexpr bool kIsRandom = false;
  static constexpr bool kStoresRatios = false;

  template <class Level>
  using Tables = DynamicMaps<Level>;
  template <class Level>
  static constexpr Tables<Level> MakeTables() {
    return MakeDynamicMaps<Level>();
  }

  // Which map a state takes. In bitsandbytes a state that is alone takes the signed one even if it
  // is never negative.
  template <class Arithmetic>
  PAGED_HD static constexpr bool IsSigned(int state) {
    return kNumStates<Arithmetic> == 1 || RoleOf<Arithmetic>(state) == Role::kSigned;
  }

  template <class Arithmetic>
  PAGED_HD static constexpr Code Zero(int state) {
    return IsSigned<Arithmetic>(state) ? 127 : 0;
  }

  template <class Arithmetic>
  static bool MayStoreWord(int, uint32_t word, bool) {
    return word < kInfinity;
  }

  template <class Arithmetic>
  static bool MayStoreCode(int state, Code& code) {
    const bool is_negative = IsSigned<Arithmetic>(state) && code < 127;
    return !is_negative || RoleOf<Arithmetic>(state) == Role::kSigned;
  }

  template <class Arithmetic, int K, class Level>
  PAGED_HD static void Decode(const DynamicMaps<Level>& maps,
                              const Lane<Arithmetic, Dynamic, K>& lane,
                              float (&states)[kNumStates<Arithmetic>][K]) {
    PAGED_UNROLL
    for (int s = 0; s < kNumStates<Arithmetic>; ++s) {
      const DynamicMap<Level>& map =
          IsSigned<Arithmetic>(s) ? maps.of_signed : maps.of_non_negative;
      // What no step stores counts as zero: what it decodes to would be looked up past the map.
      const float scale = FloatOf(lane.words[s] < kInfinity ? lane.words[s] : 0);
      LookUp(map.value, lane.codes[s], states[s]);
      PAGED_UNROLL
      for (int k = 0; k < K; ++k) states[s][k] *= scale;
    }
  }

  template <class Arithmetic, int K, class Math, class Level, class Random, class Block>
  PAGED_HD static void Encode(Math, const DynamicMaps<Level>& maps, BitRange range, Random,
                              const float (&)[K], float (&states)[kNumStates<Arithmetic>][K],
                              Lane<Arithmetic, Dynamic, K>& lane, Block block) {
    constexpr int kNu = kNonNegativeState<Arithmetic>;
    PAGED_UNROLL
    for (int s = 0; s < kNumStates<Arithmetic>; ++s) {
      lane.words[s] = s == kNu ? range.largest : block.Max(BitsOf(LargestMagnitude(states[s])));
      const float inverse = InverseScale(FloatOf(lane.words[s]));
      if (IsSigned<Arithmetic>(s)) {
        EncodeValues<true>(maps.of_signed, inverse, states[s], lane.codes[s]);
      } else {
        EncodeValues<false>(maps.of_non_negative, inverse, states[s], lane.codes[s]);
      }
    }
  }
};

}  // namespace paged_optax
