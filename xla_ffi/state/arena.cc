// See arena.h.
#include "state/arena.h"

#include <algorithm>

#include "base/notice.h"
#include "memory/preflight.h"
#include "rules/rules.h"
#include "state/shards.h"

namespace paged_optax {

int64_t SlotBytes(const Signature& signature, int64_t granularity) {
  return RoundUp(std::max<int64_t>(1, signature.MakeExtent().NumBytes()), granularity);
}

namespace {

std::vector<ArrayPlace> PlacesOf(const Signature& signature, std::string_view shards) {
  const std::vector<Signature::LeafInfo> leaves = signature.Leaves();
  const std::vector<uint64_t> stamps = StampsOf(leaves, shards);
  const Extent extent = signature.MakeExtent();
  std::vector<ArrayPlace> places;
  for (size_t i = 0; i < leaves.size(); ++i) {
    const Signature::LeafInfo& leaf = leaves[i];
    places.push_back(
        {extent.regions[leaf.format], leaf.first_block, leaf.size, stamps[i], leaf.format});
  }
  return places;
}

}  // namespace

std::shared_ptr<Arena> MakeArena(const Request& request, Token token) {
  const Signature& signature = *request.signature;
  const auto arena =
      std::shared_ptr<Arena>(new Arena{request.device,
                                       {},
                                       signature,
                                       request.tree,
                                       std::string(request.shards),
                                       LeafNames(request.names, signature.Leaves().size()),
                                       request.policy,
                                       request.part,
                                       request.run});
  arena->header = {token.handle,
                   0,
                   signature.num_slots(),
                   {0, 0},
                   {kNoCount, kNoCount},
                   0,
                   &arena->segments,
                   LayoutOf(request.fingerprint, request.part),
                   0,
                   0,
                   nullptr,
                   0};
  if (signature.rule() == kArrayRule) arena->places = PlacesOf(signature, arena->shards);
  arena->header.places = arena->places.data();
  arena->header.num_places = static_cast<int32_t>(arena->places.size());
  if (request.source == nullptr) {
    arena->header.version = arena->header.first_version = token.version;
  }
  return arena;
}

bool MayStart(const Handles& handles, const Request& request, Token token) {
  return token.version == 0 ||
         (request.restart && token.version > 0 && handles.IsFromElsewhere(token.handle));
}

void NoteRestart(const Arena& arena) {
  PostNotice({arena.device.ordinal, 0,
              "the moments of an optimizer state are not in this process, and start at zero on " +
                  Name(arena.device) +
                  ", as missing='restart' asks. Bias correction counts from this step. Where a "
                  "checkpoint should have had them, see docs/checkpoints.md."});
}

void NoteMade(const Arena& arena, int64_t resident) {
  const int64_t nbytes = arena.memory->geometry().NumBytes();
  PostNotice({arena.device.ordinal, 0,
              "made " + FormatBytes(nbytes) + " of moments on " + Name(arena.device) + ", " +
                  FormatBytes(resident) + " of them resident",
              Notice::Kind::kNews});
}

void PlaceOnHost(Arena& arena) {
  arena.memory = MakeHostMemory(SlotBytes(arena.signature, kCpuGranularity),
                                arena.signature.num_slots(), arena.policy.directory);
  arena.segments = arena.memory->Table(/*num_resident=*/1);
  NoteMade(arena, arena.memory->geometry().NumBytes());
}

ArenaReport Report(const LockedArena& locked) {
  const Arena& arena = *locked.arena;
  const Geometry& geometry = arena.memory->geometry();
  const bool on_gpu = arena.device.platform == Platform::kCuda;
  const int32_t resident = on_gpu ? arena.residency.segments : geometry.NumSegments();
  const Extent extent = arena.signature.MakeExtent();
  std::array<int64_t, kFormats.size()> resident_blocks;
  for (size_t i = 0; i < resident_blocks.size(); ++i) {
    const Region& region = extent.regions[i];
    resident_blocks[i] = resident == geometry.NumSegments()
                             ? region.num_blocks
                             : region.BlocksBelow(geometry.Offset(resident));
  }
  const std::chrono::duration<double> age = std::chrono::steady_clock::now() - arena.made;
  return {arena.device,
          locked.header.handle,
          locked.header.version,
          age.count(),
          arena.tree,
          arena.shards,
          arena.names,
          arena.memory->kind(),
          geometry.NumBytes(),
          on_gpu ? geometry.LeadingBytes(resident) : arena.memory->ResidentBytes(),
          arena.policy.device_bytes,
          arena.residency,
          extent,
          resident_blocks,
          arena.signature.rule(),
          arena.signature.num_slots(),
          arena.signature.num_devices(),
          arena.signature.Leaves(),
          arena.memory->Trouble()};
}

}  // namespace paged_optax
