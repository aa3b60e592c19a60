// States in bfloat16, rounded at random without bias: the exponent of float32 and 7 bits of
// fraction.
//
// Rounding to nearest would lose what is less than a 256th of a state, and a decay rate near 1
// moves a state by less. The upper half of an element's random word rounds the state that is never
// negative and the lower half the others, as in ratio.h.
#pragma once

#include "formats/format.h"

namespace paged_optax {

struct BFloat16 : PlainFormat {
  static constexpr char kName[] = "bfloat16";
  using Code = uint16_t;
  static constexpr int kCodeBits = 16;
  static constexpr bool kIsRandom = true;

  template <class Arithmetic>
  PAGED_HD static constexpr Code Zero(int) {
    return 0;
  }

  template <class Arithmetic>
  static bool MayStoreCode(int state, Code& code) {
    if (RoleOf<Arithmetic>(state) == Role::kSigned) return (code & 0x7fff) <= kLargest;
    if (code == 0x8000) code = 0;
    return code <= kLargest;
  }

  template <class Arithmetic, int K>
  PAGED_HD static void Decode(NoTables, const Lane<Arithmetic, BFloat16, K>& lane,
                              float (&states)[kNumStates<Arithmetic>][K]) {
    PAGED_UNROLL
    for (int s = 0; s < kNumStates<Arithmetic>; ++s) {
      PAGED_UNROLL
      for (int k = 0; k < K; ++k) {
        states[s][k] = FloatOf(static_cast<uint32_t>(lane.codes[s][k]) << 16);
      }
    }
  }

  template <class Arithmetic, int K, class Math, class Random, class Block>
  PAGED_HD static void Encode(Math, NoTables, BitRange, Random word, const float (&)[K],
                              float (&states)[kNumStates<Arithmetic>][K],
                              Lane<Arithmetic, BFloat16, K>& lane, Block) {
    PAGED_UNROLL
    for (int s = 0; s < kNumStates<Arithmetic>; ++s) {
      PAGED_UNROLL
      for (int k = 0; k < K; ++k) {
        const uint32_t random =
            s == kNonNegativeState<Arithmetic> ? word(k) >> 16 : WordOf(s, word(k)) & 0xffff;
        lane.codes[s][k] = Round(states[s][k], random);
      }
    }
  }

 private:
  static constexpr uint32_t kLargest = 0x7f7f;  // code of the largest finite number

  // Adding less than a unit of the last place rounds up as often as it should. What lies above the
  // largest number takes that one.
  PAGED_HD static Code Round(float x, uint32_t random) {
    const uint32_t bits = BitsOf(x), magnitude = bits & 0x7fffffffu;
    const uint32_t below = magnitude < (kLargest << 16) ? magnitude : kLargest << 16;
    return static_cast<Code>(((bits & 0x80000000u) | (below + random)) >> 16);
  }
};

}  // namespace paged_optax
