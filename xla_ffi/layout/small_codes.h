// How codes of 4 and of 6 bits lie in an arena: a block's 256 codes in 128 or 192 bytes. Everywhere
// else each has a byte, of which the upper bits are 0.
//
// The lower 4 bits of all codes come first, and then the upper 2 bits if there are any. So a thread
// of a GPU finds the 8 codes that it works on in 4 bytes and in 2 bytes, each aligned:
//
//   bytes 4 g .. 4 g + 3         lower bits: of codes 8 g + 0 .. 3 in the lower half of each byte,
//                                of codes 8 g + 4 .. 7 in the upper half
//   bytes 128 + 2 g, 129 + 2 g   upper bits of codes 8 g + k, for k from 0 on: from bits 4, 12, 6,
//                                14, 2, 10, 0, 8 of the 16 on
#pragma once

#include <cstring>
#include <vector>

#include "layout/layout.h"

namespace paged_optax {

inline constexpr int32_t kUpperBits = kBlockSize / 2;  // where the upper bits begin

template <class Format>
inline constexpr bool kHasSmallCodes = Format::kCodeBits < 8;
template <class Format>
inline constexpr bool kHasUpperBits = Format::kCodeBits == 6;

// Eight codes, a byte each: the first four and the last four.
struct EightCodes {
  uint32_t first, last;
};

// Codes of 4 bits have 0 for the upper bits.
PAGED_HD EightCodes UnpackEight(uint32_t lower, uint32_t upper) {
  const uint32_t twice = upper * 0x00010001u;
  EightCodes codes{lower & 0x0f0f0f0fu, lower >> 4 & 0x0f0f0f0fu};
  codes.first |= (twice & 0x00003030u) | (twice >> 2 & 0x30300000u);
  codes.last |= (twice << 2 & 0x00003030u) | (twice << 4 & 0x30300000u);
  return codes;
}

PAGED_HD uint32_t LowerBits(const EightCodes& codes) {
  return (codes.first & 0x0f0f0f0fu) | (codes.last << 4 & 0xf0f0f0f0u);
}

PAGED_HD uint32_t UpperBits(const EightCodes& codes) {
  return (codes.first & 0x3030u) | (codes.first >> 14 & 0xc0c0u) | (codes.last >> 2 & 0x0c0cu) |
         (codes.last >> 20 & 0x0303u);
}

// One state of a block, on the host.
template <bool kWithUpper>
PAGED_HD void UnpackBlock(const uint8_t* packed, uint8_t* codes) {
  for (int g = 0; g < kBlockSize / 8; ++g) {
    uint32_t lower;
    uint16_t upper = 0;
    std::memcpy(&lower, packed + 4 * g, sizeof(lower));
    if constexpr (kWithUpper) std::memcpy(&upper, packed + kUpperBits + 2 * g, sizeof(upper));
    const EightCodes eight = UnpackEight(lower, upper);
    std::memcpy(codes + 8 * g, &eight.first, 4);
    std::memcpy(codes + 8 * g + 4, &eight.last, 4);
  }
}

template <bool kWithUpper>
PAGED_HD void PackBlock(const uint8_t* codes, uint8_t* packed) {
  for (int g = 0; g < kBlockSize / 8; ++g) {
    EightCodes eight;
    std::memcpy(&eight.first, codes + 8 * g, 4);
    std::memcpy(&eight.last, codes + 8 * g + 4, 4);
    const uint32_t lower = LowerBits(eight);
    std::memcpy(packed + 4 * g, &lower, sizeof(lower));
    if constexpr (kWithUpper) {
      const uint16_t upper = static_cast<uint16_t>(UpperBits(eight));
      std::memcpy(packed + kUpperBits + 2 * g, &upper, sizeof(upper));
    }
  }
}

// What follows is for code that knows a format by the shape of its blocks. In other formats codes
// lie in an arena as everywhere else.
inline bool IsPacked(const BlockShape& shape) { return shape.state_bytes < kBlockSize; }
inline bool HasUpperBits(const BlockShape& shape) { return shape.state_bytes > kUpperBits; }

// Bytes of the codes of a state of a block outside of an arena.
inline int64_t PlainBytes(const BlockShape& shape) {
  return IsPacked(shape) ? kBlockSize : shape.state_bytes;
}

// Codes of a state, of blocks one after the other.
inline void UnpackCodes(const BlockShape& shape, const uint8_t* stored, int64_t num_blocks,
                        uint8_t* codes) {
  if (!IsPacked(shape)) {
    std::memcpy(codes, stored, num_blocks * shape.state_bytes);
    return;
  }
  const auto unpack = HasUpperBits(shape) ? &UnpackBlock<true> : &UnpackBlock<false>;
  for (int64_t b = 0; b < num_blocks; ++b) {
    unpack(stored + b * shape.state_bytes, codes + b * kBlockSize);
  }
}

// The same codes as they lie in an arena: themselves, or in `packed`, which keeps them.
inline const uint8_t* PackCodes(const BlockShape& shape, const uint8_t* codes, int64_t num_blocks,
                                std::vector<uint8_t>& packed) {
  if (!IsPacked(shape)) return codes;
  packed.resize(num_blocks * shape.state_bytes);
  const auto pack = HasUpperBits(shape) ? &PackBlock<true> : &PackBlock<false>;
  for (int64_t b = 0; b < num_blocks; ++b) {
    pack(codes + b * kBlockSize, packed.data() + b * shape.state_bytes);
  }
  return packed.data();
}

}  // namespace paged_optax
