// See transcode.h.
#include "step/transcode.h"

#include <cstring>

#include "base/cpu.h"
#include "rules/rules.h"
#include "step/lane_cpu.h"

namespace paged_optax {
namespace {

constexpr int kLane = kCpuLane;

template <class Rule, class Format>
uint8_t Zero(int32_t state) {
  return static_cast<uint8_t>(Format::template Zero<Rule>(state));
}

template <class Rule, class Format>
bool MayStoreWord(int32_t state, uint32_t word, bool is_padded) {
  return Format::template MayStoreWord<Rule>(state, word, is_padded);
}

template <class Rule, class Format>
PAGED_CLONES bool MayStoreCodes(int32_t state, uint8_t* bytes, int64_t count) {
  auto* codes = reinterpret_cast<typename Format::Code*>(bytes);
  int bad = 0;
  for (int64_t i = 0; i < count; ++i) {
    bad |= Format::template MayStoreCode<Rule>(state, codes[i]) ? 0 : 1;
  }
  return bad == 0;
}

template <class Rule>
bool MayStoreValues(int32_t state, float* values, int64_t count) {
  return MayStoreCodes<Rule, Float32>(state, reinterpret_cast<uint8_t*>(values), count);
}

template <class Rule, class Format>
PAGED_CLONES void DecodeBlock(const uint8_t* const* codes, const uint32_t* words,
                              BlockValues values) {
  Lane<Rule, Format, kLane> lane;
  for (int s = 0; s < kNumStates<Rule>; ++s) {
    std::memcpy(lane.codes[s], codes[s], sizeof(lane.codes[s]));
  }
  for (int w = 0; w < kNumWords<Rule, Format>; ++w) lane.words[w] = words[w];
  float states[kNumStates<Rule>][kLane];
  Format::template Decode<Rule>(kCpuTables<Format>, lane, states);
  std::memcpy(values, states, sizeof(states));
}

template <class Rule, class Format>
PAGED_CLONES void EncodeBlock(BlockValues values, uint8_t* const* codes, uint32_t* words) {
  float states[kNumStates<Rule>][kLane];
  std::memcpy(states, values, sizeof(states));
  BitRange range{0, 0};
  if constexpr (kNonNegativeState<Rule> >= 0) range = RangeOf(states[kNonNegativeState<Rule>]);
  Lane<Rule, Format, kLane> lane;
  // Without gradients nothing tells which elements are idle: those that have nothing stored.
  float active[kLane];
  std::memcpy(active, states[0], sizeof(active));
  Format::template Encode<Rule>(IeeeMath(), kCpuTables<Format>, range, ToNearest(), active, states,
                                lane, WholeBlock());
  for (int s = 0; s < kNumStates<Rule>; ++s) {
    std::memcpy(codes[s], lane.codes[s], sizeof(lane.codes[s]));
  }
  for (int w = 0; w < kNumWords<Rule, Format>; ++w) words[w] = lane.words[w];
}

template <class Rule, class Format>
void Decode(const uint8_t* const* codes, const uint32_t* words, BlockValues values) {
  const ScopedIeeeMode mode;
  DecodeBlock<Rule, Format>(codes, words, values);
}

template <class Rule, class Format>
void Encode(BlockValues values, uint8_t* const* codes, uint32_t* words) {
  const ScopedIeeeMode mode;
  EncodeBlock<Rule, Format>(values, codes, words);
}

}  // namespace

Transcoder FindTranscoder(int8_t rule, int8_t format) {
  Transcoder found{};
  Visit(Rules(), rule, [&](auto rule_type) {
    using Rule = typename decltype(rule_type)::type::Arithmetic;
    Visit(Formats(), format, [&](auto format_type) {
      using Format = typename decltype(format_type)::type;
      found = {&Zero<Rule, Format>,   &MayStoreWord<Rule, Format>, &MayStoreCodes<Rule, Format>,
               &MayStoreValues<Rule>, &Decode<Rule, Format>,       &Encode<Rule, Format>};
    });
  });
  return found;
}

}  // namespace paged_optax
