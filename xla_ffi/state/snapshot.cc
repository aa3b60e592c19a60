// See snapshot.h.
#include "state/snapshot.h"

#include <algorithm>
#include <cstring>

#include "base/status.h"
#include "layout/small_codes.h"

namespace paged_optax {

Snapshot::Snapshot(std::shared_ptr<Hold> hold, std::shared_ptr<const Arena> arena, int32_t slot,
                   int32_t version)
    : hold_(hold),
      arena_(arena.get()),
      slot_(slot),
      version_(version),
      leaves_(arena->signature.Leaves()),
      extent_(arena->signature.MakeExtent()),
      boxes_(FindBoxes(leaves_, arena->signature.num_devices(), arena->shards, arena->part)) {
  hold->Keep(std::move(arena));
}

int64_t Snapshot::ItemBytes(size_t leaf, Kind kind, int32_t state) const {
  const Signature::LeafInfo& info = leaves_.at(leaf);
  const BlockShape& shape = extent_.regions[info.format].shape;
  const bool has_state = kind == Kind::kResiduals ? shape.residual_bytes != 0
                         : kind == Kind::kWords   ? shape.num_words != 0
                                                  : true;
  if (!has_state || state < 0 || state >= shape.num_states) {
    throw StatusError(StatusCode::kInvalidArgument, "there is no such part of a leaf");
  }
  return kind == Kind::kWords ? 4 : kind == Kind::kCodes ? kFormats[info.format].code_bytes : 1;
}

int64_t Snapshot::NumBytes(size_t leaf, Kind kind, int32_t state) const {
  const int64_t item = ItemBytes(leaf, kind, state), size = leaves_[leaf].size;
  return item * (kind == Kind::kWords ? NumBlocks(size) : size);
}

LeafPart Snapshot::Read(size_t leaf, Kind kind, int32_t state, int64_t begin, int64_t end) const {
  const int64_t item = ItemBytes(leaf, kind, state), nbytes = NumBytes(leaf, kind, state);
  const int64_t blocks = NumBlocks(leaves_[leaf].size);
  if (end < 0) end = blocks;
  if (begin < 0 || begin > end || end > blocks) {
    throw StatusError(StatusCode::kInvalidArgument, "there is no such part of a leaf");
  }
  const int64_t block = item * (kind == Kind::kWords ? 1 : kBlockSize);
  const int64_t from = std::min(begin * block, nbytes), to = std::min(end * block, nbytes);
  LeafPart part{LeafPart::Of(item), (to - from) / item,
                std::unique_ptr<uint8_t[]>(new uint8_t[to - from])};
  ReadBytes(leaf, kind, state, from, to, part.data.get());
  return part;
}

void Snapshot::ReadBytes(size_t leaf, Kind kind, int32_t state, int64_t begin, int64_t end,
                         uint8_t* destination) const {
  const int64_t item = ItemBytes(leaf, kind, state);
  const int64_t block = item * (kind == Kind::kWords ? 1 : kBlockSize);
  const Signature::LeafInfo& info = leaves_[leaf];
  const Region& region = extent_.regions[info.format];
  const BlockShape& shape = region.shape;
  const Memory& memory = *arena().memory;
  const int64_t first = begin / block, last = (end + block - 1) / block;
  std::vector<uint8_t> packed, codes;
  std::vector<uint8_t> words, column;  // those of a block are neighbours
  ForEachRun(region, info.first_block + first, last - first,
             [&](const BlockPlace& place, int64_t done, int64_t run) {
               const int64_t start = (first + done) * block;
               const int64_t from = std::max(begin - start, int64_t{0});
               const int64_t nbytes = std::min(end - start, run * block) - from;
               uint8_t* const target = destination + (start + from - begin);
               if (kind == Kind::kCodes && IsPacked(shape)) {
                 const int64_t blocks = (from + nbytes + block - 1) / block;
                 packed.resize(blocks * shape.state_bytes);
                 memory.Read(slot_, place.codes + state * place.state_stride,
                             static_cast<int64_t>(packed.size()), packed.data());
                 codes.resize(blocks * block);
                 UnpackCodes(shape, packed.data(), blocks, codes.data());
                 std::memcpy(target, codes.data() + from, nbytes);
               } else if (kind == Kind::kCodes) {
                 memory.Read(slot_, place.codes + state * place.state_stride + from, nbytes,
                             target);
               } else if (kind == Kind::kResiduals) {
                 memory.Read(slot_, place.residuals + from, nbytes, target);
               } else {
                 words.resize(run * shape.num_words * 4);
                 memory.Read(slot_, place.words, run * shape.num_words * 4, words.data());
                 column.resize(run * 4);
                 for (int64_t i = 0; i < run; ++i) {
                   std::memcpy(&column[i * 4], &words[(i * shape.num_words + state) * 4], 4);
                 }
                 std::memcpy(target, column.data() + from, nbytes);
               }
             });
}

}  // namespace paged_optax
