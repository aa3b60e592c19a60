// Blocks out of one format into float32 and into another: for moments that come from outside of an
// arena. Nothing here trusts what it is given.
#pragma once

#include <cstdint>

#include "formats/formats.h"

namespace paged_optax {

// States of a block in float32: a row of kBlockSize for each.
using BlockValues = float (*)[kBlockSize];

// What a format is to a rule, on the CPU.
struct Transcoder {
  // The code of 0 of each state as a byte; where codes have several bytes, each of them.
  uint8_t (*zero)(int32_t state);
  // Whether a block's word of a state may be stored. `is_padded`: the block has fewer than
  // kBlockSize elements.
  bool (*may_store_word)(int32_t state, uint32_t word, bool is_padded);
  // Whether codes of a state may be stored. Turns -0 into 0 where there are no signs.
  bool (*may_store_codes)(int32_t state, uint8_t* codes, int64_t count);
  // The same for what codes stand for.
  bool (*may_store_values)(int32_t state, float* values, int64_t count);
  // `codes`: kBlockSize of each state. `words`: one a state, if the format has any.
  void (*decode)(const uint8_t* const* codes, const uint32_t* words, BlockValues values);
  // Rounds to nearest. Changes the values.
  void (*encode)(BlockValues values, uint8_t* const* codes, uint32_t* words);
};

// Numbers in Rules and Formats, which must be there.
Transcoder FindTranscoder(int8_t rule, int8_t format);

}  // namespace paged_optax
