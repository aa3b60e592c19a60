// Arrays as they are stored, and back: what the rule "array" does in place of a step. Templates
// over a lane, as block.h.
#pragma once

#include <type_traits>

#include "formats/formats.h"
#include "layout/array_place.h"
#include "rules/array.h"

namespace paged_optax {

// What a format can store of any float32: 0 in place of NaN, and nothing above 2^100. XLA may hand
// over whatever an optimizer made of its gradients.
PAGED_HD float Storable(float x) {
  constexpr uint32_t kLargest = 0x71800000u;  // bits of 2^100
  const uint32_t bits = BitsOf(x), magnitude = bits & 0x7fffffffu;
  const uint32_t below = Select(magnitude < kLargest, magnitude, kLargest);
  return FloatOf(Select(magnitude > kInfinity, 0u, (bits & 0x80000000u) | below));
}

template <class Format, int K, class Tables>
PAGED_HD void DecodeArray(const Tables& tables, const Lane<Values, Format, K>& lane,
                          float (&values)[K]) {
  float states[1][K];
  Format::template Decode<Values>(tables, lane, states);
  PAGED_UNROLL
  for (int k = 0; k < K; ++k) values[k] = states[0][k];
}

// `dither`: of the lane's first element.
template <class Format, int K, class Math, class Tables, class Block>
PAGED_HD void EncodeArray(Math math, const Tables& tables, uint32_t dither,
                          const float (&values)[K], Lane<Values, Format, K>& lane, Block block) {
  constexpr bool kIsExact = std::is_same_v<Format, Float32>;
  float states[1][K];
  PAGED_UNROLL
  for (int k = 0; k < K; ++k) states[0][k] = kIsExact ? values[k] : Storable(values[k]);
  Format::template Encode<Values>(math, tables, BitRange{0, 0}, Dither{dither}, values, states,
                                  lane, block);
}

}  // namespace paged_optax
