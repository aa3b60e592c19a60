// States as they are.
#pragma once

#include "formats/format.h"

namespace paged_optax {

struct Float32 {
  static constexpr char kName[] = "float32";
  using Code = float;
  static constexpr int kWordsPerState = 0;
  static constexpr bool kIsRandom = false;
  static constexpr bool kStoresRatios = false;

  template <class Level>
  using Tables = NoTables;
  template <class Level>
  static constexpr NoTables MakeTables() {
    return {};
  }

  PAGED_HD static constexpr Code Zero(Role) { return 0.0f; }

  static bool MayStore(Role, bool, uint32_t, bool) { return true; }  // there are no words

  template <class Rule, int K>
  PAGED_HD static void Decode(NoTables, const Lane<Rule, Float32, K>& lane,
                              float (&states)[kNumStates<Rule>][K]) {
    PAGED_UNROLL
    for (int s = 0; s < kNumStates<Rule>; ++s) {
      PAGED_UNROLL
      for (int k = 0; k < K; ++k) states[s][k] = lane.codes[s][k];
    }
  }

  template <class Rule, int K, class Math, class Random, class Block>
  PAGED_HD static void Encode(Math, NoTables, BitRange, Random,
                              float (&states)[kNumStates<Rule>][K], Lane<Rule, Float32, K>& lane,
                              Block) {
    PAGED_UNROLL
    for (int s = 0; s < kNumStates<Rule>; ++s) {
      PAGED_UNROLL
      for (int k = 0; k < K; ++k) lane.codes[s][k] = states[s][k];
    }
  }
};

}  // namespace paged_optax
