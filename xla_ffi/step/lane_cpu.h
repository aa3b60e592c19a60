// What a lane on the CPU, a whole block, adds to the arithmetic of block.h, array.h and norm.h: its
// loads and stores.
#pragma once

#include <cstring>

#include "base/dtype.h"
#include "layout/layout.h"
#include "layout/small_codes.h"

namespace paged_optax {

inline constexpr int kCpuLane = static_cast<int>(kBlockSize);

template <class Format>
inline constexpr auto kCpuTables = Format::template MakeTables<int32_t>();

// Of `source`, `count` elements from `start` on, and zeros.
PAGED_HD void LoadBlock(const void* source, DType dtype, int64_t start, int count,
                        float (&values)[kCpuLane]) {
  if (count < kCpuLane) std::memset(values, 0, sizeof(values));
  if (dtype == DType::kFloat32) {
    std::memcpy(values, static_cast<const float*>(source) + start, count * sizeof(float));
    return;
  }
  const uint16_t* halves = static_cast<const uint16_t*>(source) + start;
  if (dtype == DType::kBFloat16) {
    for (int k = 0; k < count; ++k) values[k] = FromBFloat16(halves[k]);
  } else {
    for (int k = 0; k < count; ++k) values[k] = FromFloat16(halves[k]);
  }
}

PAGED_HD void StoreBlock(void* target, DType dtype, int64_t start, int count,
                         const float (&values)[kCpuLane]) {
  if (dtype == DType::kFloat32) {
    std::memcpy(static_cast<float*>(target) + start, values, count * sizeof(float));
    return;
  }
  uint16_t* halves = static_cast<uint16_t*>(target) + start;
  if (dtype == DType::kBFloat16) {
    for (int k = 0; k < count; ++k) halves[k] = ToBFloat16(values[k]);
  } else {
    for (int k = 0; k < count; ++k) halves[k] = ToFloat16(values[k]);
  }
}

// The codes of a state of a block, out of an arena and into it.
template <class Format>
PAGED_HD void LoadCodes(const uint8_t* source, typename Format::Code (&codes)[kCpuLane]) {
  if constexpr (kHasSmallCodes<Format>) {
    UnpackBlock<kHasUpperBits<Format>>(source, codes);
  } else {
    std::memcpy(codes, source, sizeof(codes));
  }
}

template <class Format>
PAGED_HD void StoreCodes(const typename Format::Code (&codes)[kCpuLane], uint8_t* target) {
  if constexpr (kHasSmallCodes<Format>) {
    PackBlock<kHasUpperBits<Format>>(codes, target);
  } else {
    std::memcpy(target, codes, sizeof(codes));
  }
}

template <class Rule, class Format>
PAGED_HD void LoadLane(const uint8_t* source, const BlockPlace& place,
                       Lane<Rule, Format, kCpuLane>& lane) {
  using Code = typename Format::Code;
  for (int s = 0; s < kNumStates<Rule>; ++s) {
    if (source != nullptr) {
      LoadCodes<Format>(source + place.codes + s * place.state_stride, lane.codes[s]);
      continue;
    }
    const Code zero = Format::template Zero<Rule>(s);
    for (int k = 0; k < kCpuLane; ++k) lane.codes[s][k] = zero;
  }
  for (int w = 0; w < kNumWords<Rule, Format>; ++w) lane.words[w] = 0;
  if (source != nullptr) {
    std::memcpy(lane.words, source + place.words, kNumWords<Rule, Format> * sizeof(uint32_t));
  }
}

template <class Rule, class Format>
PAGED_HD void StoreLane(const Lane<Rule, Format, kCpuLane>& lane, const BlockPlace& place,
                        uint8_t* target) {
  for (int s = 0; s < kNumStates<Rule>; ++s) {
    StoreCodes<Format>(lane.codes[s], target + place.codes + s * place.state_stride);
  }
  std::memcpy(target + place.words, lane.words, kNumWords<Rule, Format> * sizeof(uint32_t));
}

}  // namespace paged_optax
