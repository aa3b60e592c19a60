// See arena.h.
#include "state/arena.h"

#include <algorithm>

#include "base/status.h"

#if PAGED_OPTAX_CUDA
#include "base/cuda_check.h"
#include "base/notice.h"
#include "memory/preflight.h"
#include "state/device_table.h"
#endif

namespace paged_optax {
namespace {

// A slot of an arena starts at a multiple of `granularity`.
int64_t SlotBytes(const Signature& signature, int64_t granularity) {
  return RoundUp(std::max<int64_t>(1, signature.MakeExtent().NumBytes()), granularity);
}

}  // namespace

std::string Name(DeviceId device) {
  return (device.platform == Platform::kCpu ? "cpu:" : "cuda:") + std::to_string(device.ordinal);
}

std::shared_ptr<Arena> MakeArena(const Request& request, Token token) {
  const auto arena = std::shared_ptr<Arena>(new Arena{request.device,
                                                      {},
                                                      *request.signature,
                                                      request.tree,
                                                      std::string(request.shards),
                                                      request.policy});
  arena->header = {token.handle,
                   0,
                   request.signature->num_slots(),
                   {0, 0},
                   &arena->segments,
                   LayoutOf(request.fingerprint, request.part)};
  return arena;
}

void PlaceOnHost(Arena& arena) {
  arena.memory = MakeHostMemory(SlotBytes(arena.signature, /*granularity=*/512),
                                arena.signature.num_slots(), arena.policy.directory);
  arena.segments = arena.memory->Table(/*num_resident=*/1);
}

ArenaReport Report(const Arena& arena, int32_t version) {
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
  return {arena.device,
          version,
          arena.tree,
          arena.shards,
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
          arena.signature.Leaves()};
}

#if PAGED_OPTAX_CUDA

// Also makes the device's copy of where its segments are.
void PlaceOnDevice(Arena& arena, DeviceTable& table, void* stream) {
  if (!arena.policy.directory.empty()) {
    throw StatusError(StatusCode::kInvalidArgument,
                      "Paging(directory='" + arena.policy.directory +
                          "') keeps moments in a file, which only the CPU can use, and this step "
                          "runs on " +
                          Name(arena.device) + ". Leave directory out. Nothing was allocated.");
  }
  ScopedDevice scope(table.ordinal);
  const Geometry geometry =
      MakeGeometry(SlotBytes(arena.signature, kChunkBytes), arena.signature.num_slots());
  std::string why_pinned = arena.policy.pinned ? "" : WhyNotManaged(table.ordinal);
  Residency& residency = arena.residency;
  residency.geometry = geometry;
  residency.device_bytes = arena.policy.device_bytes;
  residency.headroom_bytes = arena.policy.headroom_bytes;
  const FirstShare share = table.pager.FirstPlacement(residency);
  const int32_t resident = share.segments;
  if (!arena.policy.pinned && why_pinned.empty()) {
    try {
      arena.memory = MakeManagedMemory(geometry, table.ordinal, resident, stream);
    } catch (const CudaError& error) {
      why_pinned = error.what();
    }
  }
  if (arena.memory == nullptr) {
    try {
      arena.memory = MakePinnedMemory(geometry, table.ordinal, resident, stream);
    } catch (const StatusError& error) {
      if (why_pinned.empty()) throw;
      throw StatusError(error.code(), std::string(error.what()) +
                                          " (Pinned memory was tried because managed memory cannot "
                                          "be used: " +
                                          why_pinned + ")");
    }
    if (!why_pinned.empty()) {
      PostNotice({table.ordinal, 0,
                  "managed memory cannot be used: " + why_pinned +
                      ". The moments are in pinned host memory and plain device memory instead, as "
                      "with Paging(memory='pinned')."});
    }
  }
  residency.segments = residency.target = residency.held = resident;
  residency.is_kept = !arena.memory->ChangesAddresses();
  arena.segments = arena.memory->Table(resident);
  arena.device_segments = std::make_unique<DeviceBuffer>(sizeof(SegmentTable));
  CUDA_CHECK(cudaMemcpy(arena.device_segments->data(), &arena.segments, sizeof(SegmentTable),
                        cudaMemcpyDefault));
  CUDA_CHECK(cudaStreamSynchronize(cudaStreamLegacy));  // such copies may return before their end
  arena.header.segments = static_cast<SegmentTable*>(arena.device_segments->data());
  if (share.missing_bytes == 0) return;
  PostNotice({table.ordinal, share.missing_bytes,
              FormatBytes(share.missing_bytes) + " of the optimizer's " +
                  FormatBytes(geometry.NumBytes()) +
                  " of moments are in host memory, where a step takes longer: " +
                  Name(arena.device) + " has " + FormatBytes(FreeDeviceBytes(table.ordinal)) +
                  " free beside them, and Paging(headroom_bytes=" +
                  std::to_string(arena.policy.headroom_bytes) + ") of that are left alone."});
}

#endif  // PAGED_OPTAX_CUDA

}  // namespace paged_optax
