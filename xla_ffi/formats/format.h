// What a format is: a way to store the states of a block. A format knows the roles of states
// (base/roles.h) and nothing of optimizers or of where the bytes lie (layout/). formats.h lists the
// formats; float32.h is the shortest.
//
// A format is a struct with
//
//   kName            what it is called
//   Code             what it stores for an element of a state
//   kCodeBits        how many bits of it count; 4, 6, 8, 16 or 32
//   kWordsPerState   32-bit words that it stores for a block of a state: scales and the like
//   kIsRandom        whether it draws random bits
//   kStoresRatios    whether it stores signed states relative to the root of the other one
//   Tables<Level>, MakeTables   what encoding and decoding look up. `Level` is a byte where shared
//                    memory is short, an int where vector units gather
//   static Code Zero<Arithmetic>(state)     the code of 0
//   static bool MayStoreWord<Arithmetic>(state, word, is_padded)
//                    for words from outside: whether a block's word of a state decodes to finite
//                    values. `is_padded`: the block ends with zeros
//   static bool MayStoreCode<Arithmetic>(state, Code&)
//                    the same for a code; may make 0 of -0
//   static void Decode<Arithmetic>(tables, lane, states)
//   static void Encode<Arithmetic>(math, tables, range, random, directions, states, lane, block)
//
// A format knows the arithmetic of a rule (rules/rule.h) by its roles alone. Decode fills `states`,
// in float32. Encode stores them, and may change them. `range` is that of the block's non-negative
// state. random(k) is the word of the lane's element k (base/random.h). Where no state is signed,
// `directions` tell which elements are idle: those that have the direction 0.
// `block` turns the extremes of a lane into those of its block; it compares bit patterns, which
// order floats that are not negative as their values do, so the order of evaluation does not
// matter.
#pragma once

#include "base/random.h"
#include "base/roles.h"

namespace paged_optax {

// Elements of a block, whose states share their words.
inline constexpr int64_t kBlockSize = 256;

// Bytes that the codes of a state of a block take in an arena (layout/small_codes.h).
template <class Format>
inline constexpr int32_t kStateBytes = static_cast<int32_t>(kBlockSize) * Format::kCodeBits / 8;

template <class Arithmetic, class Format>
inline constexpr int kNumWords = kNumStates<Arithmetic> * Format::kWordsPerState;

// K elements of a block as they are stored.
template <class Arithmetic, class Format, int K>
struct Lane {
  alignas(16) typename Format::Code codes[kNumStates<Arithmetic>][K];
  uint32_t words[kNumWords<Arithmetic, Format> > 0 ? kNumWords<Arithmetic, Format> : 1];
};

// The word that rounds a state, from the word of its element. The upper bits of it round a state
// that is never negative, the lower 16 the others, each of which has a sequence of its own.
PAGED_HD uint32_t WordOf(int state, uint32_t word) {
  return word + static_cast<uint32_t>(state) * 0x85ebca6bu;
}

// A lane that is a whole block.
struct WholeBlock {
  PAGED_HD uint32_t Max(uint32_t lane_max) const { return lane_max; }
  PAGED_HD uint32_t Min(uint32_t lane_min) const { return lane_min; }
};

// For a format that computes without tables.
struct NoTables {
  template <class Level>
  using Tables = NoTables;
  template <class Level>
  static constexpr NoTables MakeTables() {
    return {};
  }
};

// What formats have in common that store each state as a number of its own: neither words for a
// block, nor tables.
struct PlainFormat : NoTables {
  static constexpr int kWordsPerState = 0;
  static constexpr bool kStoresRatios = false;

  template <class Arithmetic>
  static bool MayStoreWord(int, uint32_t, bool) {
    return true;  // there are no words
  }
};

inline constexpr uint32_t kInfinity = 0x7f800000;  // bits; those of negative floats are greater

}  // namespace paged_optax
