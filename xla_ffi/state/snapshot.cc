// See snapshot.h.
#include "state/snapshot.h"

#include <algorithm>
#include <cstring>

#include "base/status.h"

namespace paged_optax {

Snapshot::Snapshot(HeldArena held, int32_t slot, int32_t version)
    : held_(std::move(held)),
      slot_(slot),
      version_(version),
      leaves_(arena().signature.Leaves()),
      extent_(arena().signature.MakeExtent()),
      boxes_(FindBoxes(leaves_, arena().signature.num_devices(), arena().shards, arena().part)) {}

LeafPart Snapshot::Read(size_t leaf, Kind kind, int32_t state, int64_t begin, int64_t end) const {
  const Signature::LeafInfo& info = leaves_.at(leaf);
  const Region& region = extent_.regions[info.format];
  const BlockShape& shape = region.shape;
  const int64_t blocks = NumBlocks(info.size);
  if (end < 0) end = blocks;
  const bool has_state = kind == Kind::kResiduals ? shape.residual_bytes != 0
                         : kind == Kind::kWords   ? shape.num_words != 0
                                                  : true;
  if (!has_state || state < 0 || state >= shape.num_states || begin < 0 || begin > end ||
      end > blocks) {
    throw StatusError(StatusCode::kInvalidArgument, "there is no such part of a leaf");
  }
  const int64_t elements =
      std::min(end * kBlockSize, info.size) - std::min(begin * kBlockSize, info.size);
  const int64_t item = kind == Kind::kWords   ? 4
                       : kind == Kind::kCodes ? kFormats[info.format].code_bytes
                                              : 1;
  // Whole blocks are read, and the padding is not shown.
  LeafPart part{LeafPart::Of(item), kind == Kind::kWords ? end - begin : elements,
                std::unique_ptr<uint8_t[]>(
                    new uint8_t[(end - begin) * (kind == Kind::kWords ? 4 : item * kBlockSize)])};
  std::vector<uint8_t> words;
  const Memory& memory = *arena().memory;
  ForEachRun(region, info.first_block + begin, end - begin,
             [&](const BlockPlace& place, int64_t done, int64_t run) {
               uint8_t* const target = part.data.get();
               if (kind == Kind::kCodes) {
                 memory.Read(slot_, place.codes + state * place.state_stride,
                             run * shape.state_bytes, target + done * shape.state_bytes);
               } else if (kind == Kind::kResiduals) {
                 memory.Read(slot_, place.residuals, run * kResidualBytes,
                             target + done * kResidualBytes);
               } else {
                 words.resize(run * shape.num_words * 4);
                 memory.Read(slot_, place.words, run * shape.num_words * 4, words.data());
                 for (int64_t i = 0; i < run; ++i) {
                   std::memcpy(target + (done + i) * 4,
                               words.data() + (i * shape.num_words + state) * 4, 4);
                 }
               }
             });
  return part;
}

}  // namespace paged_optax
