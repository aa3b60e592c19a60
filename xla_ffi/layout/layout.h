// Where the bytes of a block lie in an arena, whatever rule and format they belong to.
//
// Leaves are cut into blocks of 256 elements. Each leaf starts a new block. An arena has a region
// for each format that its leaves use, one after the other, and blocks are numbered through the
// tree within their region.
//
// An arena is a row of 2 MiB chunks, the granularity in which CUDA moves managed memory. No block
// lies across the border of two chunks, and a chunk holds its blocks whole: any leading part of an
// arena that ends with a chunk is a self-contained part of the state.
//
//   a region's part of a chunk, n blocks:
//     [codes of state 0: n x bytes][codes of state 1: ...]  for each state of the rule
//     [residuals of the parameters (step/params.h): n x 256, or nothing]
//     [words: n x 4 for each word of a block]
#pragma once

#include "base/portable.h"
#include "formats/format.h"

namespace paged_optax {

inline constexpr int64_t kChunkBytes = int64_t{2} << 20;
inline constexpr int64_t kResidualBytes = kBlockSize;  // of a block, where there are residuals
// A GPU takes blocks in groups of up to this many, none of which lies across the border of two
// chunks.
inline constexpr int64_t kMaxGroup = 32;
// Of one region: 10^12 elements. A little below 2^32, so that sums with `lead` have 32 bits.
inline constexpr int64_t kMaxBlocks = (int64_t{1} << 32) - (int64_t{1} << 16);

PAGED_HD int64_t NumBlocks(int64_t size) { return (size + kBlockSize - 1) / kBlockSize; }

PAGED_HD int64_t RoundUp(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// What the blocks of a region are made of.
struct BlockShape {
  int32_t num_states = 0;
  int32_t state_bytes = 0;  // codes of one state
  int32_t num_words = 0;
  int32_t residual_bytes = 0;

  PAGED_HD int32_t NumBytes() const {
    return num_states * state_bytes + residual_bytes + num_words * 4;
  }
};

// Offsets in a slot of the arena. Of the blocks that follow in the same chunk, the parts lie one
// part size after the other.
struct BlockPlace {
  int64_t codes;         // of state 0
  int64_t state_stride;  // from the codes of one state to those of the next
  int64_t residuals;
  int64_t words;
};

// The blocks of one format. The first chunk may be shared with the region before; in it the region
// has fewer blocks.
struct Region {
  BlockShape shape = {};
  int64_t num_blocks = 0;
  int64_t first_byte = 0;
  int64_t end_byte = 0;
  uint32_t blocks_per_chunk = 1;
  uint32_t lead = 0;  // blocks that the first chunk has fewer than the others

  // Number of the chunk of the arena that a block lies in.
  PAGED_HD int64_t Chunk(int64_t block) const { return first_byte / kChunkBytes + InRegion(block); }

  // The first block in a block's chunk or, with `after` = 1, in the next chunk.
  PAGED_HD int64_t FirstInChunk(int64_t block, int64_t after = 0) const {
    const int64_t first = (InRegion(block) + after) * blocks_per_chunk - lead;
    return first < 0 ? 0 : (first < num_blocks ? first : num_blocks);
  }

  PAGED_HD BlockPlace Locate(int64_t block) const {
    const int64_t first = FirstInChunk(block), n = FirstInChunk(block, 1) - first;
    const int64_t base = InRegion(block) == 0 ? first_byte : Chunk(block) * kChunkBytes;
    const int64_t i = block - first, stride = n * shape.state_bytes;
    const int64_t residuals = base + shape.num_states * stride;
    return {base + i * shape.state_bytes, stride, residuals + i * shape.residual_bytes,
            residuals + n * shape.residual_bytes + i * shape.num_words * 4};
  }

  // How many of the first blocks lie wholly below `nbytes`, a multiple of the chunk size.
  PAGED_HD int64_t BlocksBelow(int64_t nbytes) const {
    if (nbytes >= end_byte) return num_blocks;
    const int64_t blocks = (nbytes / kChunkBytes - first_byte / kChunkBytes) * blocks_per_chunk;
    return blocks <= lead ? 0 : blocks - lead;
  }

 private:
  // 32 bits: a division that a GPU does in a few instructions. A region has fewer than kMaxBlocks.
  PAGED_HD int64_t InRegion(int64_t block) const {
    return static_cast<uint32_t>(block + lead) / blocks_per_chunk;
  }
};

// Calls body(place, done, run) for each run of `count` blocks from `first` on that lie in one
// chunk; `done` blocks came before.
template <class F>
void ForEachRun(const Region& region, int64_t first, int64_t count, const F& body) {
  for (int64_t done = 0, run; done < count; done += run) {
    const int64_t block = first + done;
    run = region.FirstInChunk(block, 1) - block;
    if (run > count - done) run = count - done;
    body(region.Locate(block), done, run);
  }
}

// A region after the one that ends at `end_of_last`.
inline Region MakeRegion(const BlockShape& shape, int64_t num_blocks, int64_t end_of_last) {
  Region region{shape, num_blocks, end_of_last, end_of_last};
  if (num_blocks == 0) return region;
  const int64_t nbytes = shape.NumBytes();
  const int64_t per_chunk = kChunkBytes / nbytes / kMaxGroup * kMaxGroup;
  region.blocks_per_chunk = static_cast<uint32_t>(per_chunk);
  region.first_byte = RoundUp(end_of_last, 512);
  int64_t room = (kChunkBytes - region.first_byte % kChunkBytes) / nbytes;
  if (room > per_chunk) room = per_chunk;
  if (num_blocks > room) {
    room = room / kMaxGroup * kMaxGroup;
    if (room == 0) {
      region.first_byte = RoundUp(region.first_byte, kChunkBytes);
      room = per_chunk;
    }
    region.lead = static_cast<uint32_t>(per_chunk - room);
  }
  const int64_t last = num_blocks - 1, chunk = region.Chunk(last) * kChunkBytes;
  const int64_t start = chunk > region.first_byte ? chunk : region.first_byte;
  region.end_byte = start + (num_blocks - region.FirstInChunk(last)) * nbytes;
  return region;
}

}  // namespace paged_optax
