// See contents.h.
#include "state/contents.h"

#include <algorithm>
#include <cstring>

#include "base/status.h"

namespace paged_optax {
namespace {

constexpr int32_t kNumStates = 2;

// Reads a slot a chunk at a time. Leaves lie in ascending order, so that each chunk is read once
// for all of the leaves that it holds.
class ChunkReader {
 public:
  ChunkReader(const Memory& memory, int32_t slot)
      : memory_(memory), slot_(slot), chunk_bytes_(new uint8_t[kChunkBytes]) {}

  // The bytes from `offset` to the end of its chunk, until the next call.
  const uint8_t* At(int64_t offset) {
    const int64_t chunk = offset / kChunkBytes;
    if (chunk != chunk_) {
      const int64_t begin = chunk * kChunkBytes;
      const int64_t end = std::min(begin + kChunkBytes, memory_.geometry().slot_bytes);
      memory_.Read(slot_, begin, end - begin, chunk_bytes_.get());
      chunk_ = chunk;
    }
    return chunk_bytes_.get() + offset % kChunkBytes;
  }

 private:
  const Memory& memory_;
  const int32_t slot_;
  const std::unique_ptr<uint8_t[]> chunk_bytes_;
  int64_t chunk_ = -1;
};

LeafPart MakePart(LeafPart::Type type, int64_t size) {
  const int64_t item = type == LeafPart::Type::kFloat32 ? sizeof(float) : 1;
  return {type, size, std::unique_ptr<uint8_t[]>(new uint8_t[size * item])};
}

int64_t OffsetOf(const void* address) {  // of a part that was located from the address 0
  return static_cast<int64_t>(reinterpret_cast<uintptr_t>(address));
}

constexpr const uint8_t* kOrigin = nullptr;

LeafParts ReadFloat32(const ArenaExtent& extent, const Signature::LeafInfo& leaf,
                      ChunkReader& reader) {
  const int64_t blocks = NumBlocks(leaf.size);
  constexpr int64_t kBytes = kBlockSize * sizeof(float);
  LeafParts parts;
  for (int32_t state = 0; state < kNumStates; ++state) {
    parts.push_back(MakePart(LeafPart::Type::kFloat32, blocks * kBlockSize));
  }
  for (int64_t block = 0; block < blocks; ++block) {
    const auto located = extent.LocateFloat32(kOrigin, leaf.first_block + block);
    const uint8_t* source = reader.At(OffsetOf(located.mu));
    for (int32_t state = 0; state < kNumStates; ++state) {
      std::memcpy(parts[state].data.get() + block * kBytes, source + state * kBytes, kBytes);
    }
  }
  return parts;
}

LeafParts Read8Bit(const ArenaExtent& extent, const Signature::LeafInfo& leaf,
                   ChunkReader& reader) {
  const int64_t blocks = NumBlocks(leaf.size);
  LeafParts parts;
  for (int32_t state = 0; state < kNumStates; ++state) {
    parts.push_back(MakePart(LeafPart::Type::kUint8, blocks * kBlockSize));
  }
  for (int32_t state = 0; state < kNumStates; ++state) {
    parts.push_back(MakePart(LeafPart::Type::kFloat32, blocks));
  }
  const int64_t per_chunk = extent.QuantizedBlocksPerChunk();
  for (int64_t block = 0, run; block < blocks; block += run) {
    const int64_t first = leaf.first_block + block;
    run = std::min(blocks - block, per_chunk - first % per_chunk);
    const auto located = extent.LocateQuantized(kOrigin, first);
    const uint8_t* codes[kNumStates] = {located.mu, located.nu};
    for (int32_t state = 0; state < kNumStates; ++state) {
      std::memcpy(parts[state].data.get() + block * kBlockSize, reader.At(OffsetOf(codes[state])),
                  run * kBlockSize);
    }
    const uint8_t* words = reader.At(OffsetOf(located.scales));  // those of a block are neighbours
    for (int64_t i = 0; i < run * kNumStates; ++i) {
      uint8_t* target = parts[kNumStates + i % kNumStates].data.get();
      std::memcpy(target + (block + i / kNumStates) * sizeof(float), words + i * sizeof(float),
                  sizeof(float));
    }
  }
  return parts;
}

}  // namespace

std::vector<LeafParts> ReadLeaves(const LockedArena& locked, int32_t slot) {
  const Arena& arena = *locked.arena;
  const ArenaExtent& extent = arena.signature.extent();
  // One for either kind of leaf, which lie in places of their own.
  ChunkReader codes(*arena.memory, slot), floats(*arena.memory, slot);
  std::vector<LeafParts> leaves;
  for (const Signature::LeafInfo& leaf : arena.signature.Leaves()) {
    leaves.push_back(Is8Bit(leaf.codec) ? Read8Bit(extent, leaf, codes)
                                        : ReadFloat32(extent, leaf, floats));
  }
  return leaves;
}

std::vector<LeafPart> ReadResiduals(const LockedArena& locked, int32_t slot) {
  const Arena& arena = *locked.arena;
  const ArenaExtent& extent = arena.signature.extent();
  if (!extent.has_residuals) {
    throw StatusError(StatusCode::kInvalidArgument, "this optimizer state keeps no residuals");
  }
  ChunkReader of_8_bits(*arena.memory, slot), of_float32(*arena.memory, slot);
  std::vector<LeafPart> leaves;
  for (const Signature::LeafInfo& leaf : arena.signature.Leaves()) {
    const int64_t blocks = NumBlocks(leaf.size);
    ChunkReader& reader = Is8Bit(leaf.codec) ? of_8_bits : of_float32;
    LeafPart part = MakePart(LeafPart::Type::kUint8, blocks * kResidualBytes);
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t offset = extent.ResidualOffset(leaf.codec, leaf.first_block + block);
      std::memcpy(part.data.get() + block * kResidualBytes, reader.At(offset), kResidualBytes);
    }
    leaves.push_back(std::move(part));
  }
  return leaves;
}

}  // namespace paged_optax
