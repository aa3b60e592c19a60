// The list of formats. A program names a format by its place here. The blocks of an arena lie in
// this order. Formats with few bytes an element come first, because leading regions stay in a GPU's
// memory longest.
#pragma once

#include <array>

#include "formats/bfloat16.h"
#include "formats/dynamic.h"
#include "formats/float32.h"
#include "formats/ratio.h"

namespace paged_optax {

using Formats = List<Ratio4, Ratio6, Ratio, Dynamic, BFloat16, Float32>;

// What the rest of the library knows of a format.
struct FormatInfo {
  const char* name;
  int32_t code_bytes;   // of an element of a state, everywhere but in an arena
  int32_t state_bytes;  // of a state of a block, in an arena
  int32_t words_per_state;
  bool stores_ratios;  // so that the word of a second moment is a window, and no scale
  bool is_random;      // whether it draws random bits, and so needs the leaves' keys
};

template <class... Format>
constexpr std::array<FormatInfo, sizeof...(Format)> DescribeFormats(List<Format...>) {
  return {{{Format::kName, static_cast<int32_t>(sizeof(typename Format::Code)), kStateBytes<Format>,
            Format::kWordsPerState, Format::kStoresRatios, Format::kIsRandom}...}};
}

inline constexpr auto kFormats = DescribeFormats(Formats());

}  // namespace paged_optax
