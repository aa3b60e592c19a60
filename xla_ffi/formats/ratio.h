// The `ratio` formats, with codes of 8, 6 and 4 bits. They store second moments as floats with few
// bits of fraction and first moments as multiples of about sqrt(second moment). Both are rounded at
// random without bias. Specified in NumPy by paged_optax/_reference; docs/numerics.md says what
// they were chosen over.
//
// Here "second moment" means a state that is never negative and "first moment" a signed one.
// Without a second moment the unit of a first moment is 1.
//
// Second moments. A code stands for the float whose bits are (code + offset) * step, or for 0. The
// step is the least, of 2^16 .. 2^21 and these and a quarter, a half or three quarters, with which
// the codes reach from the block's largest value to its smallest but 0: 7 .. 2 bits of fraction,
// over 2 .. 63 octaves. With 6 bits steps go to 2^23: 7 .. 0 bits of fraction, over 0.5 .. 60
// octaves. With 4 bits they go to 2^25, four octaves, over 0.1 .. 48. There is no scale to multiply
// with, so the values that codes stand for stay where they are when the block's largest value
// moves: until the step changes, what has not changed is stored without error again. Adding random
// bits before the division rounds without bias, because the floats of an octave are evenly spaced;
// with a step of more than an octave it does not. The block's word holds the offset, the step, and
// whether code 0 stands for 0.
//
// First moments. A code k of -127 .. 127 (-31 .. 31 with 6 bits, -7 .. 7 with 4) stands for
// k |k| / 127^2 (31^2, 7^2) times the block's scale times the element's unit, a power of two or 1.5
// times one near the square root of its stored second moment. So it is the update that is stored
// with a certain precision, however different the gradients in a block are. The unit is made of the
// bits of the second moment; the scale is the largest ratio of a first moment to its unit.
//
// A state of which nothing is known (Role::kAny) is stored as second moments are in blocks without
// a negative value, and as first moments are in the others. A bit of the word says which.
//
// A GPU runs integer instructions and comparisons at half the rate of float arithmetic and has
// time for about a hundred instructions an element. So what is rare in a block (zeros, wide ranges,
// huge numbers) is looked for once a block and handled apart from the common path.
#pragma once

#include "formats/format.h"

namespace paged_optax {

inline constexpr uint32_t kStepShift = 14;  // a step is so many times 2^14: four are the finest

// What depends on the number of bits of a code. Of the codes one is for 0, one for rounding up at
// the top, and one each for the ends of a block's range, which are cut off.
template <int kBits>
struct RatioCodes;

template <>
struct RatioCodes<8> {
  static constexpr uint32_t kTop = 253;  // of the largest value, before rounding
  static constexpr uint32_t kCoarsestStep = 128;
  static constexpr uint32_t kHasZeros = 1u << 8;  // in a block's word, next to the step
  // 127^2, and a little less so that a block's largest ratio stays below it when it is scaled.
  static constexpr float kSquares = 16128.99f;
  // Greater second moments are stored as this one, which rounding up leaves finite.
  static constexpr uint32_t kLargestNu = 0x7f000000;  // 2^127
  // 256 codes reach over this if 251 reach over the range.
  PAGED_HD static uint32_t WithEnds(uint32_t range) { return range + range / 64 + range / 256; }
};

template <>
struct RatioCodes<6> {
  static constexpr uint32_t kTop = 62;
  static constexpr uint32_t kCoarsestStep = 512;
  static constexpr uint32_t kHasZeros = 1u << 15;
  static constexpr float kSquares = 960.9994f;  // of 31^2
  static constexpr uint32_t kLargestNu = 0x7f000000;
  PAGED_HD static uint32_t WithEnds(uint32_t range) { return range + range / 16; }  // 60 of 64
};

template <>
struct RatioCodes<4> {
  static constexpr uint32_t kTop = 14;
  static constexpr uint32_t kCoarsestStep = 2048;
  static constexpr uint32_t kHasZeros = 1u << 15;
  static constexpr float kSquares = 48.99997f;        // of 7^2
  static constexpr uint32_t kLargestNu = 0x7d800000;  // 2^124
  // 16 codes if 12.2 reach over the range. 12.8 would do, but then steps change more often, and
  // updates are a fifth further from float32's (docs/decisions.md).
  PAGED_HD static uint32_t WithEnds(uint32_t range) { return range + range / 4 + range / 16; }
};

// The second moment of an element without gradients decays forever. Such elements widen a block's
// range no further than this.
inline constexpr uint32_t kIdleRange = 15u << 23;
// In the word of a state of which nothing is known: the word is a window. Offsets leave this bit
// free, and scales have no sign.
inline constexpr uint32_t kIsWindow = 0x80000000u;

// ------------------------------------------------------------------------------- second moments

// A block's codes stand for base + code * step. If the block has zeros, code 0 stands for 0.
struct RatioGrid {
  uint32_t step;
  uint32_t base;
  bool has_zeros;
};

template <int kBits>
PAGED_HD RatioGrid GridOf(uint32_t word) {
  constexpr uint32_t kHasZeros = RatioCodes<kBits>::kHasZeros;
  const uint32_t step = (word & (kHasZeros - 1)) << kStepShift;
  return {step, (word >> 16) * step, (word & kHasZeros) != 0};
}

// A step in units of 2^kStepShift, and how to divide by it: take the upper half of a product with
// the reciprocal, 2^(32 + shift) / step rounded up, and shift it.
struct alignas(16) RatioStep {
  uint32_t units, shift, reciprocal, step;
};

struct RatioWindow {
  RatioGrid grid;
  uint32_t word;
  uint32_t reciprocal;
  uint32_t shift;
};

// Steps of 4, 5, 6 and 7 times a power of two, from the finest on. They end with the coarsest, all
// codes of which span 2^29.
template <int kBits>
struct RatioSteps {
  static constexpr uint32_t kFirst = (127 + 16 + kBits) << 2, kLast = (127 + 29) << 2;
  RatioStep of[kLast - kFirst + 1];
};

template <int kBits>
constexpr RatioSteps<kBits> MakeRatioSteps() {
  RatioSteps<kBits> steps{};
  for (uint32_t i = 0; i < sizeof(steps.of) / sizeof(RatioStep); ++i) {
    const uint32_t quarters = 4 + i % 4, units = quarters << (i / 4);
    const uint64_t reciprocal = ((uint64_t{1} << 33) + quarters - 1) / quarters;
    steps.of[i] = {units, 15 + i / 4, static_cast<uint32_t>(reciprocal), units << kStepShift};
  }
  return steps;
}

template <int kBits>
inline constexpr RatioSteps<kBits> kRatioSteps = MakeRatioSteps<kBits>();
#if defined(__CUDACC__)
template <int kBits>
static __constant__ RatioSteps<kBits> kRatioStepsOnGpu = MakeRatioSteps<kBits>();
#endif

template <int kBits>
PAGED_HD RatioStep RatioStepOf(uint32_t i) {
#if defined(__CUDA_ARCH__)
  return kRatioStepsOnGpu<kBits>.of[i];
#else
  return kRatioSteps<kBits>.of[i];
#endif
}

// For a block whose largest second moment has the bits `top`, and whose codes have to span `range`.
template <int kBits>
PAGED_HD RatioWindow FitWindow(uint32_t top, uint32_t range, bool has_zeros) {
  using Codes = RatioCodes<kBits>;
  using Steps = RatioSteps<kBits>;
  constexpr uint32_t kFinest = (1u << (16 + kBits)) - 1;  // the span for the finest step
  const uint32_t with_ends = Codes::WithEnds(range);
  const uint32_t span = with_ends > kFinest ? with_ends : kFinest;
  // The step is 5, 6, 7 or 8 times a power of two, and all codes of it are more than the span. As a
  // float the span has these quarters as the first bits of its fraction: one more of them, which
  // may carry into the exponent, is the step.
  const uint32_t above = (BitsBelow(span) >> 21) + 1;
  const uint32_t fitting = above < Steps::kLast ? above : Steps::kLast;
  const RatioStep step = RatioStepOf<kBits>(fitting - Steps::kFirst);
  const uint32_t top_code = MultiplyHighAdd(top, step.reciprocal, 0) >> step.shift;
  const int32_t below = static_cast<int32_t>(top_code) - static_cast<int32_t>(Codes::kTop);
  const uint32_t offset = static_cast<uint32_t>(below > 0 ? below : 0);
  const uint32_t word = offset << 16 | (has_zeros ? Codes::kHasZeros : 0) | step.units;
  return {{step.step, offset * step.step, has_zeros}, word, step.reciprocal, step.shift};
}

template <int K>
PAGED_HD void DecodeRatioNus(const uint8_t (&codes)[K], const RatioGrid& grid, float (&nu)[K]) {
  PAGED_UNROLL
  for (int k = 0; k < K; ++k) nu[k] = FloatOf(MultiplyAdd(ByteOf(codes, k), grid.step, grid.base));
  if (grid.has_zeros) {
    PAGED_UNROLL
    for (int k = 0; k < K; ++k) nu[k] = Select(codes[k] == 0, 0.0f, nu[k]);
  }
}

// Rounds second moments between 0 and the largest. The upper bits of `random` decide. On return, nu
// holds what the codes stand for, and `not_zero` no bits where a second moment was 0, else all
// bits.
template <int K>
PAGED_HD void EncodeRatioNus(const RatioWindow& window, const uint32_t (&random)[K], float (&nu)[K],
                             uint8_t (&codes)[K], uint32_t (&not_zero)[K]) {
  const RatioGrid& grid = window.grid;
  const int32_t base = static_cast<int32_t>(grid.base), step = static_cast<int32_t>(grid.step);
  PAGED_UNROLL
  for (int k = 0; k < K; ++k) not_zero[k] = Select(BitsOf(nu[k]) == 0, 0u, ~0u);
  PAGED_UNROLL
  for (int k = 0; k < K; ++k) {
    // What lies below the window takes the lowest code.
    const int32_t above = static_cast<int32_t>(BitsOf(nu[k])) - base;
    const uint32_t x = static_cast<uint32_t>(above > step ? above : step);
    const uint32_t added = random[k] >> (32 - window.shift);
    const uint32_t code = MultiplyHighAdd(x, window.reciprocal, added) >> window.shift;
    codes[k] = static_cast<uint8_t>(code);
    nu[k] = FloatOf(MultiplyAdd(code, grid.step, grid.base));
  }
  if (grid.has_zeros) {
    PAGED_UNROLL
    for (int k = 0; k < K; ++k) codes[k] = static_cast<uint8_t>(codes[k] & not_zero[k]);
  }
}

// -------------------------------------------------------------------------------- first moments

// Half of nu's exponent field makes the exponent of the unit. The field's last bit makes a factor
// of 1.5. The reciprocal is rounded.
PAGED_HD float UnitOf(float nu) {
  return FloatOf(MultiplyAdd(BitsOf(nu) >> 23, 1u << 22, 127u << 22));
}
PAGED_HD float UnitReciprocalOf(float nu) {
  const uint32_t e = BitsOf(nu) >> 23;
  const uint32_t of_odd_e = MultiplyAdd(e, 0u - (1u << 22), 0x7f000000u - (127u << 22) - 0x155555u);
  return FloatOf(MultiplyAdd(e & 1, 0x155555u, of_odd_e));
}

// The scales of a block of first moments. A larger magnitude is stored as if it were the largest. A
// block whose scale is below the least counts as zero.
template <bool kHasUnit>
struct Limits;
// Of ratios. Decay rates with b1^2 > b2 let them grow. Ratios below 2^-64 do not move a parameter.
template <>
struct Limits<true> {
  static constexpr float kLargest = 4294967296.0f, kLeast = 5.42101086e-20f;  // 2^32, 2^-64
};
// Of first moments themselves, which are those of usable gradients (rules/rule.h). A scale from the
// least one on has a finite reciprocal in units of a step.
template <>
struct Limits<false> {
  static constexpr float kLargest = 1.26765060e30f, kLeast = 1.92592994e-34f;  // 2^100, 2^-112
};

// Factors from the block's scale: for decoding, and for encoding.
template <int kBits>
PAGED_HD float MuStep(float scale) {
  return scale * (1.0f / RatioCodes<kBits>::kSquares);
}
template <int kBits, class Math>
PAGED_HD float InverseMuStep(Math math, float scale, float least) {
  const bool is_usable = scale >= least;
  constexpr float kSquares = RatioCodes<kBits>::kSquares;
  return Select(is_usable, kSquares * math.Reciprocal(Select(is_usable, scale, 1.0f)), 0.0f);
}

// Of element `i`, in units.
template <int kBits>
PAGED_HD float DecodeRatioMu(const uint8_t* codes, int i, float mu_step) {
  const float k = SignedOf<kBits>(codes, i);
  return k * Abs(k) * mu_step;
}

// Of a ratio no greater than the block's scale. The lower 16 bits of `random` decide.
//
// Let f be uniform in [0, 1). Rounding x >= 0 up from k^2 to (k + 1)^2 if x - k^2 > f (2 k + 1) has
// no bias. The condition means sqrt(x - f (1 - f)) > k + f, so one square root gives both
// neighbours and the choice between them.
template <int kBits, class Math>
PAGED_HD uint8_t EncodeRatioMu(Math math, float ratio, float inverse_mu_step, uint32_t random) {
  const float x = Abs(ratio) * inverse_mu_step;
  const float h = Plus128(random) - 128.5f;  // f - 1/2
  const float y = (x - 0.25f) + h * h;
  const float level = math.Sqrt(Max(y, 8.67361738e-19f)) - h;  // 2^-60
  const float signed_level = FloatOf(BitsOf(level) | (BitsOf(ratio) & 0x80000000u));
  // Rounds to the nearest integer; the low bits are its two's complement.
  return static_cast<uint8_t>(BitsOf(signed_level + 12582912.0f) & ((1u << kBits) - 1));
}

// --------------------------------------------------------------------------------- whole blocks

// The window of a block. `top` and `bottom` are the bits of the block's largest and smallest
// non-negative value. `active` is 0 where an element is idle.
template <int kBits, int K, class Block>
PAGED_HD RatioWindow FitBlock(const float (&nu)[K], const float (&active)[K], uint32_t top,
                              uint32_t bottom, Block block) {
  const bool has_zeros = bottom == 0;
  if (has_zeros) bottom = block.Min(LeastWhereNonZero(nu, nu));
  uint32_t range = top > bottom ? top - bottom : 0;
  if (range > kIdleRange) {
    float counted[K];
    PAGED_UNROLL
    for (int k = 0; k < K; ++k) counted[k] = Select(nu[k] == 0.0f, 0.0f, active[k]);
    bottom = block.Min(LeastWhereNonZero(nu, counted));
    const uint32_t active_range = top > bottom ? top - bottom : 0;
    range = active_range > kIdleRange ? active_range : kIdleRange;
  }
  return FitWindow<kBits>(top, range, has_zeros);
}

template <int kBits>
struct RatioOf : NoTables {
  static constexpr const char* kName = kBits == 8 ? "ratio" : kBits == 6 ? "ratio6" : "ratio4";
  using Code = uint8_t;
  static constexpr int kCodeBits = kBits;
  static constexpr int kWordsPerState = 1;  // of a signed state its scale, of the other the window
  static constexpr bool kIsRandom = true;
  static constexpr bool kStoresRatios = true;

  template <class Arithmetic>
  PAGED_HD static constexpr Code Zero(int) {
    return 0;
  }

  template <class Arithmetic>
  static bool MayStoreWord(int state, uint32_t word, bool is_padded) {
    const bool is_window = kIsAny<Arithmetic> && (word & kIsWindow) != 0;
    if (is_window) word &= ~kIsWindow;
    if (!is_window && RoleOf<Arithmetic>(state) == Role::kSigned) {
      return word <= BitsOf(Limits<(kNonNegativeState<Arithmetic> >= 0)>::kLargest);
    }
    using Codes = RatioCodes<kBits>;
    constexpr uint32_t kHasZeros = Codes::kHasZeros, kUnused = 0x10000u - 2 * kHasZeros;
    const uint64_t units = word & (kHasZeros - 1);
    const uint64_t last = (word >> 16) + (1u << kBits) - 1;  // the largest code's multiple
    if (units == 0) return word == 0;                        // all codes stand for 0
    const bool is_known = units <= Codes::kCoarsestStep && (word & kUnused) == 0;
    return is_known && (last * units) << kStepShift < kInfinity &&
           (!is_padded || (word & kHasZeros) != 0);
  }

  template <class Arithmetic>
  static bool MayStoreCode(int, Code& code) {
    return code >> kBits == 0;
  }

  template <class Arithmetic, int K>
  PAGED_HD static void Decode(NoTables, const Lane<Arithmetic, RatioOf, K>& lane,
                              float (&states)[kNumStates<Arithmetic>][K]) {
    if constexpr (kIsAny<Arithmetic>) {
      if ((lane.words[0] & kIsWindow) != 0) {
        DecodeRatioNus(lane.codes[0], GridOf<kBits>(lane.words[0] & ~kIsWindow), states[0]);
        return;
      }
    }
    constexpr int kNu = kNonNegativeState<Arithmetic>;
    if constexpr (kNu >= 0)
      DecodeRatioNus(lane.codes[kNu], GridOf<kBits>(lane.words[kNu]), states[kNu]);
    PAGED_UNROLL
    for (int s = 0; s < kNumStates<Arithmetic>; ++s) {
      if (s == kNu) continue;
      const float step = MuStep<kBits>(FloatOf(lane.words[s]));
      PAGED_UNROLL
      for (int k = 0; k < K; ++k) {
        if constexpr (kNu >= 0) {
          states[s][k] = DecodeRatioMu<kBits>(lane.codes[s], k, step) * UnitOf(states[kNu][k]);
        } else {
          states[s][k] = DecodeRatioMu<kBits>(lane.codes[s], k, step);
        }
      }
    }
  }

  template <class Arithmetic, int K, class Math, class Random, class Block>
  PAGED_HD static void Encode(Math math, NoTables, BitRange range, Random word,
                              const float (&directions)[K],
                              float (&states)[kNumStates<Arithmetic>][K],
                              Lane<Arithmetic, RatioOf, K>& lane, Block block) {
    constexpr int kNu = kNonNegativeState<Arithmetic>;
    uint32_t random[K];
    PAGED_UNROLL
    for (int k = 0; k < K; ++k) random[k] = word(k);
    if constexpr (kIsAny<Arithmetic>) {
      if (!HasNegative(states[0], block)) {
        lane.words[0] = kIsWindow | EncodeNonNegatives(random, states[0], lane.codes[0], block);
        return;
      }
    }
    if constexpr (kNu >= 0) EncodeNus(range, random, directions, states, lane, block);
    PAGED_UNROLL
    for (int s = 0; s < kNumStates<Arithmetic>; ++s) {
      if (s == kNu) continue;
      if constexpr (kNu >= 0) {  // the ratio to its unit from here on
        PAGED_UNROLL
        for (int k = 0; k < K; ++k) states[s][k] *= UnitReciprocalOf(states[kNu][k]);
      }
      PAGED_UNROLL
      for (int k = 0; k < K; ++k) random[k] = WordOf(s, word(k));
      lane.words[s] = EncodeMus<Limits<(kNu >= 0)>>(math, random, states[s], lane.codes[s], block);
    }
  }

 private:
  // Second moments of a block. On return they are what the codes stand for, and a first moment
  // whose second moment was 0 is 0.
  template <class Arithmetic, int K, class Block>
  PAGED_HD static void EncodeNus(BitRange range, const uint32_t (&random)[K],
                                 const float (&directions)[K],
                                 float (&states)[kNumStates<Arithmetic>][K],
                                 Lane<Arithmetic, RatioOf, K>& lane, Block block) {
    constexpr int kNu = kNonNegativeState<Arithmetic>;
    float (&nu)[K] = states[kNu];
    const uint32_t top = LimitNus(range.largest, nu);
    const float (&active)[K] = ActiveOf<Arithmetic>(states, directions);
    const RatioWindow window = FitBlock<kBits>(nu, active, top, range.least, block);
    uint32_t not_zero[K];
    EncodeRatioNus(window, random, nu, lane.codes[kNu], not_zero);
    lane.words[kNu] = window.word;
    if (!window.grid.has_zeros) return;
    PAGED_UNROLL
    for (int s = 0; s < kNumStates<Arithmetic>; ++s) {
      if (s == kNu) continue;
      PAGED_UNROLL
      for (int k = 0; k < K; ++k) states[s][k] = FloatOf(BitsOf(states[s][k]) & not_zero[k]);
    }
  }

  // Takes values above the largest as that one. Returns the bits of the largest, which were `top`.
  template <int K>
  PAGED_HD static uint32_t LimitNus(uint32_t top, float (&nu)[K]) {
    constexpr uint32_t kLargestNu = RatioCodes<kBits>::kLargestNu;
    if (top <= kLargestNu) return top;
    PAGED_UNROLL
    for (int k = 0; k < K; ++k) {
      nu[k] = Select(BitsOf(nu[k]) < kLargestNu, nu[k], FloatOf(kLargestNu));
    }
    return kLargestNu;
  }

  template <int K, class Block>
  PAGED_HD static bool HasNegative(const float (&values)[K], Block block) {
    uint32_t negative = 0;
    PAGED_UNROLL
    for (int k = 0; k < K; ++k) negative |= Select(values[k] < 0.0f, 1u, 0u);
    return block.Max(negative) != 0;
  }

  // A block of a state of which nothing is known. No element is idle. Returns the window.
  template <int K, class Block>
  PAGED_HD static uint32_t EncodeNonNegatives(const uint32_t (&random)[K], float (&values)[K],
                                              uint8_t (&codes)[K], Block block) {
    PAGED_UNROLL
    for (int k = 0; k < K; ++k) values[k] = Abs(values[k]);  // -0 is 0
    const BitRange range = RangeOf(values, block);
    const uint32_t top = LimitNus(range.largest, values);
    const RatioWindow window = FitBlock<kBits>(values, values, top, range.least, block);
    uint32_t not_zero[K];
    EncodeRatioNus(window, random, values, codes, not_zero);
    return window.word;
  }

  // What is 0 where an element is idle.
  template <class Arithmetic, int K>
  PAGED_HD static const float (&ActiveOf(const float (&states)[kNumStates<Arithmetic>][K],
                                         const float (&directions)[K])) [K] {
    if constexpr (kFirstSigned<Arithmetic> >= 0)
      return states[kFirstSigned<Arithmetic>];
    else
      return directions;
  }

  // First moments of a block, in units. Returns the word.
  template <class L, int K, class Math, class Block>
  PAGED_HD static uint32_t EncodeMus(Math math, const uint32_t (&random)[K], float (&mu)[K],
                                     uint8_t (&codes)[K], Block block) {
    float scale = FloatOf(block.Max(BitsOf(LargestMagnitude(mu))));
    if (scale > L::kLargest) {
      PAGED_UNROLL
      for (int k = 0; k < K; ++k) {
        const float above = mu[k] > -L::kLargest ? mu[k] : -L::kLargest;
        mu[k] = above < L::kLargest ? above : L::kLargest;
      }
      scale = L::kLargest;
    }
    const float inverse_step = InverseMuStep<kBits>(math, scale, L::kLeast);
    PAGED_UNROLL
    for (int k = 0; k < K; ++k) {
      codes[k] = EncodeRatioMu<kBits>(math, mu[k], inverse_step, random[k]);
    }
    return BitsOf(scale);
  }
};

using Ratio = RatioOf<8>;
using Ratio6 = RatioOf<6>;
using Ratio4 = RatioOf<4>;

}  // namespace paged_optax
