// The contents of one arena, which stay as they are while somebody reads them piece by piece.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "state/arena.h"
#include "state/contents.h"
#include "state/hold.h"
#include "state/shards.h"

namespace paged_optax {

class Snapshot {
 public:
  // What is stored of a leaf: codes and words, for each state, and residuals.
  enum class Kind : int8_t { kCodes, kWords, kResiduals };

  // `slot` holds the contents of this version.
  Snapshot(std::shared_ptr<Hold> hold, std::shared_ptr<const Arena> arena, int32_t slot,
           int32_t version);

  const Arena& arena() const { return *arena_; }
  int32_t version() const { return version_; }
  const std::vector<Signature::LeafInfo>& leaves() const { return leaves_; }
  // Where the leaves' parts on this device lie; nothing if that is not known.
  const std::optional<std::vector<LeafBox>>& boxes() const { return boxes_; }

  // Of blocks [begin, end) of a leaf, without the padding of its last block. `end` < 0: to the end.
  LeafPart Read(size_t leaf, Kind kind, int32_t state, int64_t begin, int64_t end) const;

  // How many bytes such a part of the whole leaf has, and bytes [begin, end) of it. Any thread may
  // read.
  int64_t NumBytes(size_t leaf, Kind kind, int32_t state) const;
  void ReadBytes(size_t leaf, Kind kind, int32_t state, int64_t begin, int64_t end,
                 uint8_t* destination) const;

 private:
  // Throws if there is no such part. How many bytes an element has, or a block of words.
  int64_t ItemBytes(size_t leaf, Kind kind, int32_t state) const;

  std::shared_ptr<const Hold> hold_;  // has the arena too
  const Arena* arena_;
  int32_t slot_;
  int32_t version_;
  std::vector<Signature::LeafInfo> leaves_;
  Extent extent_;
  std::optional<std::vector<LeafBox>> boxes_;
};

}  // namespace paged_optax
