// Where the bytes of a block of moments lie in an arena. Used by both step implementations and by
// whoever reads moments out.
//
// Leaves are cut into blocks of 256 elements, each leaf starting a new block, and blocks are
// numbered through the tree per codec. An arena is a row of 2 MiB chunks (the granularity in which
// CUDA moves managed memory); a chunk keeps its blocks' codes and scales together, so that any
// leading part of the arena is a self-contained part of the state. First come all 8-bit blocks,
// the last chunk being as long as they need; then, one behind the other, all float32 blocks, none
// of which lies across the border of two chunks. Where residuals of the parameters are kept
// (rounding.h), every block has 256 bytes more: in the 8-bit chunks, and behind the last float32
// block for all of those.
//
//   8-bit chunk: [mu codes: n x 256][nu codes: n x 256][residuals: n x 256, or nothing]
//                  [mu scale, nu scale: n x 8]
//   float32 block: [mu: 1024][nu: 1024]
#pragma once

#include <type_traits>

#include "base/portable.h"

namespace paged_optax {

enum class Codec : int8_t { kFloat32, kDynamic, kRatio };

// Codecs of 8 bits share a layout: two codes an element and two 4-byte words a block. The blocks of
// a state are all of one of them.
PAGED_HD bool Is8Bit(Codec codec) { return codec != Codec::kFloat32; }

inline constexpr int64_t kBlockSize = 256;
inline constexpr int64_t kChunkBytes = int64_t{2} << 20;
inline constexpr int64_t kQuantizedBlockBytes = 2 * kBlockSize + 2 * sizeof(float);
inline constexpr int64_t kFloat32BlockBytes = 2 * kBlockSize * sizeof(float);
inline constexpr int64_t kResidualBytes = kBlockSize;  // of a block, where there are residuals
// A GPU takes blocks in groups of up to this many, none of which lies across the border of two
// chunks.
inline constexpr int64_t kMaxGroup = 16;
inline constexpr int64_t kQuantizedBlocksPerChunk =
    kChunkBytes / kQuantizedBlockBytes / kMaxGroup * kMaxGroup;
inline constexpr int64_t kResidualBlocksPerChunk =
    kChunkBytes / (kQuantizedBlockBytes + kResidualBytes) / kMaxGroup * kMaxGroup;
static_assert(kChunkBytes % kFloat32BlockBytes == 0);

inline constexpr int64_t kMaxBlocks = int64_t{1}
                                      << 32;  // of one codec in one arena: 10^12 elements

PAGED_HD int64_t NumBlocks(int64_t size) { return (size + kBlockSize - 1) / kBlockSize; }

PAGED_HD int64_t RoundUp(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// Addresses of a block's parts. Byte is uint8_t, or const uint8_t to read only.
template <class Byte>
struct QuantizedBlock {
  using Float = std::conditional_t<std::is_const_v<Byte>, const float, float>;
  Byte* mu;
  Byte* nu;
  Float* scales;  // of mu and of nu
};

template <class Byte>
struct Float32Block {
  using Float = typename QuantizedBlock<Byte>::Float;
  Float* mu;
  Float* nu;
};

// The extent of an arena; with its base address it locates every block.
struct ArenaExtent {
  int64_t num_quantized_blocks = 0;
  int64_t num_float32_blocks = 0;
  bool has_residuals = false;

  PAGED_HD int64_t QuantizedBlockBytes() const {
    return has_residuals ? kQuantizedBlockBytes + kResidualBytes : kQuantizedBlockBytes;
  }

  PAGED_HD int64_t QuantizedBlocksPerChunk() const {
    return has_residuals ? kResidualBlocksPerChunk : kQuantizedBlocksPerChunk;
  }

  PAGED_HD int64_t QuantizedBytes() const {
    const int64_t chunks = num_quantized_blocks / QuantizedBlocksPerChunk();
    const int64_t rest = num_quantized_blocks % QuantizedBlocksPerChunk();
    return RoundUp(chunks * kChunkBytes + rest * QuantizedBlockBytes(), 512);
  }

  PAGED_HD int64_t Float32Offset() const { return RoundUp(QuantizedBytes(), kFloat32BlockBytes); }

  PAGED_HD int64_t NumBytes() const {
    if (num_float32_blocks == 0) return QuantizedBytes();
    return Float32ResidualOffset(has_residuals ? num_float32_blocks : 0);
  }

  // Of the blocks in arena order (8-bit ones, then float32 ones), how many of the first lie
  // wholly below `nbytes`, a multiple of the chunk size. Of float32 blocks with residuals, all or
  // none.
  PAGED_HD int64_t BlocksBelow(int64_t nbytes) const {
    const int64_t quantized = nbytes / kChunkBytes * QuantizedBlocksPerChunk();
    if (quantized < num_quantized_blocks) return quantized;
    const int64_t float32 = (nbytes - Float32Offset()) / kFloat32BlockBytes;
    if (float32 <= 0 || (has_residuals && nbytes < NumBytes())) return num_quantized_blocks;
    return num_quantized_blocks + (float32 < num_float32_blocks ? float32 : num_float32_blocks);
  }

  // Number of the chunk that a block lies in.
  PAGED_HD int64_t QuantizedChunk(int64_t block) const {
    // 32 bits and a constant: a division that a GPU does in a few instructions. Arenas have fewer
    // blocks (kMaxBlocks).
    return has_residuals
               ? static_cast<uint32_t>(block) / static_cast<uint32_t>(kResidualBlocksPerChunk)
               : static_cast<uint32_t>(block) / static_cast<uint32_t>(kQuantizedBlocksPerChunk);
  }

  PAGED_HD int64_t Float32Chunk(int64_t block) const {
    return (Float32Offset() + block * kFloat32BlockBytes) / kChunkBytes;
  }

  template <class Byte>
  PAGED_HD QuantizedBlock<Byte> LocateQuantized(Byte* base, int64_t block) const {
    const int64_t chunk = QuantizedChunk(block);
    const int64_t first = chunk * QuantizedBlocksPerChunk();
    const int64_t i = block - first;
    const int64_t left = num_quantized_blocks - first;
    const int64_t n = left < QuantizedBlocksPerChunk() ? left : QuantizedBlocksPerChunk();
    Byte* mu = base + chunk * kChunkBytes;
    Byte* nu = mu + n * kBlockSize;
    auto* scales = reinterpret_cast<typename QuantizedBlock<Byte>::Float*>(
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
    const int64_t chunk = QuantizedChunk(block);
    const int64_t first = chunk * QuantizedBlocksPerChunk();
    const int64_t left = num_quantized_blocks - first;
    const int64_t n = left < QuantizedBlocksPerChunk() ? left : QuantizedBlocksPerChunk();
    return chunk * kChunkBytes + n * 2 * kBlockSize + (block - first) * kResidualBytes;
  }

 private:
  PAGED_HD int64_t Float32ResidualOffset(int64_t block) const {
    return Float32Offset() + num_float32_blocks * kFloat32BlockBytes + block * kResidualBytes;
  }
};

}  // namespace paged_optax
