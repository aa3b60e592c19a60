// Where the moments of a new state go on a GPU. See arena.h.
#include "base/cuda_check.h"
#include "base/device_buffer.h"
#include "base/notice.h"
#include "base/status.h"
#include "memory/gpus.h"
#include "memory/preflight.h"
#include "state/arena.h"

namespace paged_optax {
namespace {

// Managed memory; or pinned memory, if that is asked for or managed memory cannot be used.
std::unique_ptr<Memory> MakeMemory(const Arena& arena, int32_t num_resident, Stream stream) {
  const Geometry& geometry = arena.residency.geometry;
  const int ordinal = arena.device.ordinal;
  if (arena.policy.pinned) return MakePinnedMemory(geometry, ordinal, num_resident, stream);
  std::string why_pinned = WhyNotManaged(ordinal);
  if (why_pinned.empty()) {
    try {
      return MakeManagedMemory(geometry, ordinal, num_resident, stream);
    } catch (const CudaError& error) {
      why_pinned = error.what();
    }
  }
  std::unique_ptr<Memory> memory;
  try {
    memory = MakePinnedMemory(geometry, ordinal, num_resident, stream);
  } catch (const StatusError& error) {
    throw StatusError(error.code(), std::string(error.what()) +
                                        " (Pinned memory was tried because managed memory cannot "
                                        "be used: " +
                                        why_pinned + ")");
  }
  PostNotice({ordinal, 0,
              "managed memory cannot be used: " + why_pinned +
                  ". The moments are in pinned host memory and plain device memory instead, as "
                  "with Paging(memory='pinned')."});
  return memory;
}

void SendSegments(Arena& arena) {
  arena.device_segments = std::make_shared<DeviceBuffer>(sizeof(SegmentTable));
  CUDA_CHECK(cudaMemcpy(arena.device_segments->data(), &arena.segments, sizeof(SegmentTable),
                        cudaMemcpyDefault));
  CUDA_CHECK(cudaStreamSynchronize(cudaStreamLegacy));  // such copies may return before their end
  arena.header.segments = static_cast<SegmentTable*>(arena.device_segments->data());
}

}  // namespace

void PrepareResidency(Arena& arena) {
  if (!arena.policy.directory.empty()) {
    throw StatusError(StatusCode::kInvalidArgument,
                      "Paging(directory='" + arena.policy.directory +
                          "') keeps moments in a file, which only the CPU can use, and this step "
                          "runs on " +
                          Name(arena.device) + ". Leave directory out. Nothing was allocated.");
  }
  Residency& residency = arena.residency;
  residency.geometry =
      MakeGeometry(SlotBytes(arena.signature, kChunkBytes), arena.signature.num_slots());
  residency.device_bytes = arena.policy.device_bytes;
  residency.headroom_bytes = arena.policy.headroom_bytes;
}

void PlaceOnDevice(Arena& arena, const FirstShare& share, Stream stream) {
  const int ordinal = arena.device.ordinal;
  const ScopedDevice scope(ordinal);
  Residency& residency = arena.residency;
  arena.memory = MakeMemory(arena, share.segments, stream);
  residency.segments = residency.target = residency.held = share.segments;
  residency.is_kept = !arena.memory->ChangesAddresses();
  arena.segments = arena.memory->Table(share.segments);
  SendSegments(arena);
  NoteMade(arena, residency.geometry.LeadingBytes(share.segments));
  if (share.missing_bytes == 0) return;
  PostNotice({ordinal, share.missing_bytes,
              FormatBytes(share.missing_bytes) + " of the optimizer's " +
                  FormatBytes(residency.geometry.NumBytes()) +
                  " of moments are in host memory, where a step takes longer: " +
                  Name(arena.device) + " has " + FormatBytes(FreeDeviceBytes(ordinal)) +
                  " free next to them, and Paging(headroom_bytes=" +
                  std::to_string(arena.policy.headroom_bytes) + ") of that are left alone."});
}

}  // namespace paged_optax
