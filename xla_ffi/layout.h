// Where the bytes of a block of moments lie in an arena. Used by both step implementations and by
// whoever reads moments out.
//
// Leaves are cut into blocks of 256 elements, each leaf starting a new block, and blocks are
// numbered through the tree per codec. An arena is a row of 2 MiB chunks (the granularity in which
// CUDA moves managed memory); a chunk keeps its blocks' codes and scales together, so that any
// leading part of the arena is a self-contained part of the state. First come all 8-bit blocks,
// the last chunk being as long as they need; then, one behind the other, all float32 blocks, none
// of which lies across the border of two chunks. Where residuals of the parameters are kept
// (rounding.h), every block has 256 bytes more: in the dynamic chunks, and behind the last float32
// block for all of those.
//
//   dynamic chunk: [mu codes: n x 256][nu codes: n x 256][residuals: n x 256, or nothing]
//                  [mu scale, nu scale: n x 8]
//   float32 block: [mu: 1024][nu: 1024]
#pragma once

#include <type_traits>

#include "portable.h"

namespace paged_optax {

enum class Codec : int8_t { kFloat32, kDynamic, kRatio };

// Codecs of 8 bits share a layout: two codes an element and two 4-byte words a block. The blocks of
// a state are all of one of them.
PAGED_HD bool Is8Bit(Codec codec) { return codec != Codec::kFloat32; }

inline constexpr int64_t kBlockSize = 256;
inline constexpr int64_t kChunkBytes = int64_t{2} << 20;
inline constexpr int64_t kDynamicBlockBytes = 2 * kBlockSize + 2 * sizeof(float);
inline constexpr int64_t kFloat32BlockBytes = 2 * kBlockSize * sizeof(float);
inline constexpr int64_t kResidualBytes = kBlockSize;  // of a block, where there are residuals
// A GPU takes blocks in groups of up to this many, none of which lies across the border of two
// chunks.
inline constexpr int64_t kMaxGroup = 16;
inline constexpr int64_t kDynamicBlocksPerChunk =
    kChunkBytes / kDynamicBlockBytes / kMaxGroup * kMaxGroup;
inline constexpr int64_t kResidualBlocksPerChunk =
    kChunkBytes / (kDynamicBlockBytes + kResidualBytes) / kMaxGroup * kMaxGroup;
static_assert(kChunkBytes % kFloat32BlockBytes == 0);

inline constexpr int64_t kMaxBlocks = int64_t{1}
                                      << 32;  // of one codec in one arena: 10^12 elements

PAGED_HD int64_t NumBlocks(int64_t size) { return (size + kBlockSize - 1) / kBlockSize; }

PAGED_HD int64_t RoundUp(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// Addresses of a block's parts. Byte is uint8_t, or const uint8_t to read only.
template <class Byte>
struct DynamicBlock {
  using Float = std::conditional_t<std::is_const_v<Byte>, const float, float>;
  Byte* mu;
  Byte* nu;
  Float* scales;  // of mu and of nu
};

template <class Byte>
struct Float32Block {
  using Float = typename DynamicBlock<Byte>::Float;
  Float* mu;
  Float* nu;
};

// The extent of an arena; with its base address it locates every block.
struct ArenaExtent {
  int64_t num_dynamic_blocks = 0;
  int64_t num_float32_blocks = 0;
  bool has_residuals = false;

  PAGED_HD int64_t DynamicBlockBytes() const {
    return has_residuals ? kDynamicBlockBytes + kResidualBytes : kDynamicBlockBytes;
  }

  PAGED_HD int64_t DynamicBlocksPerChunk() const {
    return has_residuals ? kResidualBlocksPerChunk : kDynamicBlocksPerChunk;
  }

  PAGED_HD int64_t DynamicBytes() const {
    const int64_t chunks = num_dynamic_blocks / DynamicBlocksPerChunk();
    const int64_t rest = num_dynamic_blocks % DynamicBlocksPerChunk();
    return RoundUp(chunks * kChunkBytes + rest * DynamicBlockBytes(), 512);
  }

  PAGED_HD int64_t Float32Offset() const { return RoundUp(DynamicBytes(), kFloat32BlockBytes); }

  PAGED_HD int64_t NumBytes() const {
    if (num_float32_blocks == 0) return DynamicBytes();
    return Float32ResidualOffset(has_residuals ? num_float32_blocks : 0);
  }

  // Of the blocks in arena order (dynamic ones, then float32 ones), how many of the first lie
  // wholly below `nbytes`, a multiple of the chunk size. Of float32 blocks with residuals, all or
  // none.
  PAGED_HD int64_t BlocksBelow(int64_t nbytes) const {
    const int64_t dynamic = nbytes / kChunkBytes * DynamicBlocksPerChunk();
    if (dynamic < num_dynamic_blocks) return dynamic;
    const int64_t float32 = (nbytes - Float32Offset()) / kFloat32BlockBytes;
    if (float32 <= 0 || (has_residuals && nbytes < NumBytes())) return num_dynamic_blocks;
    return num_dynamic_blocks + (float32 < num_float32_blocks ? float32 : num_float32_blocks);
  }

  // Number of the chunk that a block lies in.
  PAGED_HD int64_t DynamicChunk(int64_t block) const {
    // 32 bits and a constant: a division that a GPU does in a few instructions. Arenas have fewer
    // blocks (kMaxBlocks).
    return has_residuals
               ? static_cast<uint32_t>(block) / static_cast<uint32_t>(kResidualBlocksPerChunk)
               : static_cast<uint32_t>(block) / static_cast<uint32_t>(kDynamicBlocksPerChunk);
  }

  PAGED_HD int64_t Float32Chunk(int64_t block) const {
    return (Float32Offset() + block * kFloat32BlockBytes) / kChunkBytes;
  }

  template <class Byte>
  PAGED_HD DynamicBlock<Byte> LocateDynamic(Byte* base, int64_t block) const {
    const int64_t chunk = DynamicChunk(block);
    const int64_t first = chunk * DynamicBlocksPerChunk();
    const int64_t i = block - first;
    const int64_t left = num_dynamic_blocks - first;
    const int64_t n = left < DynamicBlocksPerChunk() ? left : DynamicBlocksPerChunk();
    Byte* mu = base + chunk * kChunkBytes;
    Byte* nu = mu + n * kBlockSize;
    auto* scales = reinterpret_cast<typename DynamicBlock<Byte>::Float*>(
        nu + n * (has_residuals ? kBlockSize + kResidualBytes : kBlockSize));
    return {mu + i * kBlockSize, nu + i * kBlockSize, scales + 2 * i};
  }

  template <class Byte>
  PAGED_HD Float32Block<Byte> LocateFloat32(Byte* base, int64_t block) const {
    auto* mu = reinterpret_cast<typename Float32Block<Byte>::Float*>(base + Float32Offset() +
                                                                     block * kFloat32BlockBytes);
    return {mu, mu + kBlockSize};
  }

  // Offset of a block's residuals, if there are any. Those of a float32 block may lie in another
  // chunk than the block.
  PAGED_HD int64_t ResidualOffset(Codec codec, int64_t block) const {
    if (codec == Codec::kFloat32) return Float32ResidualOffset(block);
    const int64_t chunk = DynamicChunk(block);
    const int64_t first = chunk * DynamicBlocksPerChunk();
    const int64_t left = num_dynamic_blocks - first;
    const int64_t n = left < DynamicBlocksPerChunk() ? left : DynamicBlocksPerChunk();
    return chunk * kChunkBytes + n * 2 * kBlockSize + (block - first) * kResidualBytes;
  }

 private:
  PAGED_HD int64_t Float32ResidualOffset(int64_t block) const {
    return Float32Offset() + num_float32_blocks * kFloat32BlockBytes + block * kResidualBytes;
  }
};

}  // namespace paged_optax
