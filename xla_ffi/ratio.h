// The `ratio` 8-bit code for moments: second moments as floats with few bits of fraction, first
// moments as multiples of about sqrt(second moment), both rounded at random without bias. Used by
// the CPU loop and the CUDA kernel; specified in NumPy by paged_optax/_reference.py. What it was
// chosen over, and why: docs/numerics.md.
//
// A block has 256 elements, two codes each, and two words.
//
// Second moments. A code stands for the float whose bits are (code + offset) << shift; code 0 for
// 0. The shift is the least, of 16 .. 21, with which the codes reach from the block's largest value
// to its smallest but 0: 7 .. 2 bits of fraction, over 2 .. 63 octaves. There is no scale to
// multiply with, so the values that codes stand for stay where they are when the block's largest
// value moves, and a smaller shift only adds values between them: what has not changed is stored
// without error again. Adding random bits below the cut rounds without bias, because the floats of
// an octave are evenly spaced. The block's word holds the leading bits of its largest value, and
// the shift.
//
// First moments. A code k of -127 .. 127 stands for k |k| / 127^2 times the block's scale times the
// element's unit, a power of two or 1.5 times one near the square root of its stored second
// moment. So it is the update that is stored with a certain precision, however different the
// gradients in a block are. The unit is made of the bits of the second moment; the scale is the
// largest ratio of a first moment to its unit.
#pragma once

#include <cmath>

#include "portable.h"

namespace paged_optax {

inline constexpr uint32_t kFinestShift = 16, kCoarsestShift = 21;
// Codes that a block's range may span: 255 for non-zero values, one of them for rounding up at the
// top, and one each for the two ends of the range, which are cut off.
inline constexpr uint32_t kWindowCodes = 252;
inline constexpr uint32_t kTopCode = 254;  // of the largest value, before rounding
// Elements without gradient decay for ever; they widen a block's range no further than this.
inline constexpr uint32_t kIdleRange = 15u << 23;

// ------------------------------------------------------------------------------- second moments

struct RatioWindow {
  uint32_t shift;
  uint32_t offset;
};

// The word of a block, from the bits of its largest second moment and from the negated bits of the
// smallest that is not 0, of all elements and of the active ones (0 where there is none).
PAGED_HD uint32_t WindowWord(uint32_t top, uint32_t depth, uint32_t active_depth) {
  const uint32_t idle_depth = top > kIdleRange ? kIdleRange - top : 0xffffffffu;
  depth = depth < idle_depth ? depth : idle_depth;
  const uint32_t range = top + (depth > active_depth ? depth : active_depth);
  uint32_t shift = kFinestShift;
  PAGED_UNROLL
  for (uint32_t s = kFinestShift; s < kCoarsestShift; ++s) shift += (range >> s) > kWindowCodes;
  return (top & 0xffff0000u) | shift;
}

PAGED_HD RatioWindow WindowOf(uint32_t word) {
  const uint32_t shift = word & 31, top = word >> shift;
  return {shift, top > kTopCode ? top - kTopCode : 0};
}

PAGED_HD float DecodeRatioNu(uint8_t code, RatioWindow window) {
  return FloatOf(code == 0 ? 0 : (code + window.offset) << window.shift);
}

struct RatioNu {
  uint32_t bits;  // of the value that is stored
  uint8_t code;
};

// Rounds the second moment with `nu_bits`: finite, not negative, and no greater than the largest of
// the window's block. The upper bits of `random` decide.
PAGED_HD RatioNu EncodeRatioNu(uint32_t nu_bits, RatioWindow window, uint32_t random) {
  const uint32_t largest = 0x7f7fffffu >> window.shift;  // never infinity
  const uint32_t cut = (nu_bits + (random >> (32 - window.shift))) >> window.shift;
  const uint32_t below = cut < largest ? cut : largest;
  // What lies below the window takes the lowest code; only 0 is stored as 0.
  const uint32_t lowest = window.offset + 1;
  const uint32_t kept = below > lowest ? below : lowest;
  return {Select(nu_bits == 0, 0u, kept << window.shift),
          static_cast<uint8_t>(Select(nu_bits == 0, 0u, kept - window.offset))};
}

// -------------------------------------------------------------------------------- first moments

struct MuUnit {
  float unit;
  float reciprocal;  // 1 / unit, rounded
};

PAGED_HD MuUnit UnitOf(float nu) {
  // Half the exponent; of the fraction, the bit that the exponent's parity leaves behind.
  const uint32_t unit = ((BitsOf(nu) >> 1) + 0x1fc00000u) & 0xffc00000u;
  const bool is_odd = (unit & 0x00400000u) != 0;
  return {FloatOf(unit), FloatOf(Select(is_odd, 0x7f000000u - 0x155555u, 0x7f000000u) - unit)};
}

// 127^2, and a little less so that a block's largest ratio stays below it when it is scaled.
inline constexpr float kSquares = 16128.99f;

// A ratio beyond this (decay rates with b1^2 > b2 let it grow) is stored as if it were this.
inline constexpr uint32_t kLargestRatioBits = 0x4f800000u;  // 2^32

// Factors from the block's scale: for decoding, and for encoding. Ratios below 2^-64 do not move a
// parameter; a block of them counts as zero.
PAGED_HD float MuStep(float scale) { return scale * (1.0f / kSquares); }
PAGED_HD float InverseMuStep(float scale) {
  return scale >= 5.42101086e-20f ? kSquares / scale : 0.0f;
}

// Numbers below 2^22 as integers and as floats: at this size a float's low bits count by ones.
inline constexpr float kOnes = 12582912.0f;  // 1.5 * 2^23

PAGED_HD float DecodeRatioMu(uint8_t code, float mu_step, float unit) {
  // 2^23 + 128 + k, from the code with its sign bit flipped.
  const float k = FloatOf(0x4b000080u ^ code) - 8388736.0f;
  return k * FloatOf(BitsOf(k) & 0x7fffffffu) * mu_step * unit;
}

// The greatest integer k with k^2 <= x, for x in [0, 2^20).
PAGED_HD float FloorSqrt(float x) {
#if defined(__CUDA_ARCH__)
  float root;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(x));
#else
  const float root = std::sqrt(x);
#endif
  // Made a little too small, so that only one side has to be looked at.
  const float k = (root * 0.99999905f - 0.5f + kOnes) - kOnes;
  const float next = k + 1.0f;
  return Select(next * next <= x, next, k);
}

// The lower 16 bits of `random` decide.
PAGED_HD uint8_t EncodeRatioMu(float ratio, float inverse_mu_step, uint32_t random) {
  const float scaled = FloatOf(BitsOf(ratio) & 0x7fffffffu) * inverse_mu_step;
  const float x = scaled < kSquares ? scaled : kSquares;
  const float k = FloorSqrt(x), next = k + 1.0f;
  // Both sides are exact: x - k^2 fits the bits of x; 16 random bits in [0, 1) times 8 bits.
  const float fraction = FloatOf(0x3f800000u | (random << 7 & 0x007fff80u)) - 1.0f;
  const float level = Select(x - k * k > fraction * (k + next), next, k);
  const float signed_level = FloatOf(BitsOf(level) | (BitsOf(ratio) & 0x80000000u));
  return static_cast<uint8_t>(BitsOf(signed_level + kOnes));  // the low byte: two's complement
}

inline constexpr uint8_t kZeroRatio = 0;  // code of zero, of both moments

// --------------------------------------------------------------------------------- random bits

// The word that decides for element i of a leaf at the step that follows `count` steps:
// RatioStart(leaf, i) + RatioPhase(count). Along the steps and along the elements it runs through
// sequences that fill [0, 2^32) evenly (H. Weyl's, with the golden ratio and with the plastic
// number): of n draws, n p fall below p up to an error of order log n, where independent ones would
// leave sqrt(n). It is this that second moments average over a thousand steps. A hash of the
// element in place of the second sequence follows float32 no better, and takes a tenth of a GPU's
// step.
inline constexpr uint32_t kRatioStride = 0xc13fa9a9u;

PAGED_HD uint32_t RatioPhase(int32_t count) { return static_cast<uint32_t>(count) * 0x9e3779b9u; }

PAGED_HD uint32_t RatioStart(uint64_t leaf, int64_t element) {
  return static_cast<uint32_t>(leaf ^ (leaf >> 32)) + static_cast<uint32_t>(element) * kRatioStride;
}

}  // namespace paged_optax
