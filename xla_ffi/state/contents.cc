// See contents.h.
#include "state/contents.h"

#include <algorithm>
#include <cstring>

#include "base/status.h"
#include "layout/small_codes.h"

namespace paged_optax {
namespace {

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
  std::unique_ptr<uint8_t[]> chunk_bytes_;
  int64_t chunk_ = -1;
};

LeafPart MakePart(int64_t item_bytes, int64_t size) {
  return {LeafPart::Of(item_bytes), size,
          std::unique_ptr<uint8_t[]>(new uint8_t[size * item_bytes])};
}

LeafParts ReadLeaf(const Region& region, const Signature::LeafInfo& leaf, ChunkReader& reader) {
  const BlockShape& shape = region.shape;
  const int64_t blocks = NumBlocks(leaf.size);
  LeafParts parts;
  for (int32_t s = 0; s < shape.num_states; ++s) {
    parts.push_back(MakePart(kFormats[leaf.format].code_bytes, blocks * kBlockSize));
  }
  for (int32_t w = 0; w < shape.num_words; ++w) {
    parts.push_back(MakePart(sizeof(float), blocks));
  }
  ForEachRun(region, leaf.first_block, blocks,
             [&](const BlockPlace& place, int64_t done, int64_t run) {
               for (int32_t s = 0; s < shape.num_states; ++s) {
                 UnpackCodes(shape, reader.At(place.codes + s * place.state_stride), run,
                             parts[s].data.get() + done * PlainBytes(shape));
               }
               if (shape.num_words == 0) return;
               const uint8_t* words = reader.At(place.words);  // those of a block are neighbours
               for (int64_t i = 0; i < run * shape.num_words; ++i) {
                 uint8_t* target = parts[shape.num_states + i % shape.num_words].data.get();
                 std::memcpy(target + (done + i / shape.num_words) * 4, words + i * 4, 4);
               }
             });
  return parts;
}

void CheckFits(const LeafRewrite& rewrite, const Region& region, const Signature::LeafInfo& leaf) {
  using Arrays = std::vector<LeafRewrite::Bytes>;
  const auto fits = [&](const Arrays& arrays, int32_t count, int64_t block_bytes) {
    return arrays.size() == static_cast<size_t>(count) &&
           std::all_of(arrays.begin(), arrays.end(), [&](const LeafRewrite::Bytes& array) {
             return array.size == NumBlocks(leaf.size) * block_bytes;
           });
  };
  const BlockShape& shape = region.shape;
  if (!fits(rewrite.codes, shape.num_states, PlainBytes(shape)) ||
      !fits(rewrite.words, shape.num_words, sizeof(float))) {
    throw StatusError(StatusCode::kInvalidArgument, "codes or words of another leaf or format");
  }
}

void WriteLeaf(const LeafRewrite& rewrite, const Region& region, const Signature::LeafInfo& leaf,
               int32_t slot, Memory& memory) {
  const BlockShape& shape = region.shape;
  std::vector<uint8_t> packed, words;
  ForEachRun(region, leaf.first_block, NumBlocks(leaf.size),
             [&](const BlockPlace& place, int64_t done, int64_t run) {
               for (int32_t s = 0; s < shape.num_states; ++s) {
                 memory.Write(slot, place.codes + s * place.state_stride, run * shape.state_bytes,
                              PackCodes(shape, rewrite.codes[s].data + done * PlainBytes(shape),
                                        run, packed));
               }
               if (shape.num_words == 0) return;
               words.resize(run * shape.num_words * 4);  // those of a block are neighbours
               for (int64_t i = 0; i < run * shape.num_words; ++i) {
                 std::memcpy(
                     &words[i * 4],
                     rewrite.words[i % shape.num_words].data + (done + i / shape.num_words) * 4, 4);
               }
               memory.Write(slot, place.words, static_cast<int64_t>(words.size()), words.data());
             });
}

}  // namespace

void CheckLeaves(const LockedArena& locked, const std::vector<LeafRewrite>& leaves) {
  const Extent extent = locked.arena->signature.MakeExtent();
  const std::vector<Signature::LeafInfo> infos = locked.arena->signature.Leaves();
  for (const LeafRewrite& rewrite : leaves) {
    const Signature::LeafInfo& info = infos.at(rewrite.leaf);
    CheckFits(rewrite, extent.regions[info.format], info);
  }
}

void WriteLeaves(const LockedArena& locked, int32_t slot, const std::vector<LeafRewrite>& leaves) {
  const Arena& arena = *locked.arena;
  const Extent extent = arena.signature.MakeExtent();
  const std::vector<Signature::LeafInfo> infos = arena.signature.Leaves();
  for (const LeafRewrite& rewrite : leaves) {
    const Signature::LeafInfo& info = infos[rewrite.leaf];
    WriteLeaf(rewrite, extent.regions[info.format], info, slot, *arena.memory);
  }
}

std::vector<LeafParts> ReadLeaves(const LockedArena& locked, int32_t slot) {
  const Arena& arena = *locked.arena;
  const Extent extent = arena.signature.MakeExtent();
  // One a region: within it leaves lie in ascending order.
  std::vector<ChunkReader> readers;
  for (size_t i = 0; i < kFormats.size(); ++i) readers.emplace_back(*arena.memory, slot);
  std::vector<LeafParts> leaves;
  for (const Signature::LeafInfo& leaf : arena.signature.Leaves()) {
    leaves.push_back(ReadLeaf(extent.regions[leaf.format], leaf, readers[leaf.format]));
  }
  return leaves;
}

std::vector<LeafPart> ReadResiduals(const LockedArena& locked, int32_t slot) {
  const Arena& arena = *locked.arena;
  if (!arena.signature.has_residuals()) {
    throw StatusError(StatusCode::kInvalidArgument, "this optimizer state keeps no residuals");
  }
  const Extent extent = arena.signature.MakeExtent();
  std::vector<ChunkReader> readers;
  for (size_t i = 0; i < kFormats.size(); ++i) readers.emplace_back(*arena.memory, slot);
  std::vector<LeafPart> leaves;
  for (const Signature::LeafInfo& leaf : arena.signature.Leaves()) {
    const int64_t blocks = NumBlocks(leaf.size);
    LeafPart part = MakePart(1, blocks * kResidualBytes);
    ForEachRun(extent.regions[leaf.format], leaf.first_block, blocks,
               [&](const BlockPlace& place, int64_t done, int64_t run) {
                 std::memcpy(part.data.get() + done * kResidualBytes,
                             readers[leaf.format].At(place.residuals), run * kResidualBytes);
               });
    leaves.push_back(std::move(part));
  }
  return leaves;
}

}  // namespace paged_optax
