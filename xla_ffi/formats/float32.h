// States as they are.
#pragma once

#include "formats/format.h"

namespace paged_optax {

struct Float32 : PlainFormat {
  static constexpr char kName[] = "float32";
  using Code = float;
  static constexpr int kCodeBits = 32;
  static constexpr bool kIsRandom = false;

  template <class Arithmetic>
  PAGED_HD static constexpr Code Zero(int) {
    return 0.0f;
  }

  template <class Arithmetic>
  static bool MayStoreCode(int state, Code& code) {
    if (RoleOf<Arithmetic>(state) == Role::kSigned) return (BitsOf(code) & 0x7fffffffu) < kInfinity;
    if (code == 0.0f) code = 0.0f;
    return BitsOf(code) < kInfinity;
  }

  template <class Arithmetic, int K>
  PAGED_HD static void Decode(NoTables, const Lane<Arithmetic, Float32, K>& lane,
                              float (&states)[kNumStates<Arithmetic>][K]) {
    PAGED_UNROLL
    for (int s = 0; s < kNumStates<Arithmetic>; ++s) {
      PAGED_UNROLL
      for (int k = 0; k < K; ++k) states[s][k] = lane.codes[s][k];
    }
  }

  template <class Arithmetic, int K, class Math, class Random, class Block>
  PAGED_HD static void Encode(Math, NoTables, BitRange, Random, const float (&)[K],
                              float (&states)[kNumStates<Arithmetic>][K],
                              Lane<Arithmetic, Float32, K>& lane, Block) {
    PAGED_UNROLL
    for (int s = 0; s < kNumStates<Arithmetic>; ++s) {
      PAGED_UNROLL
      for (int k = 0; k < K; ++k) lane.codes[s][k] = states[s][k];
    }
  }
};

}  // namespace paged_optax
