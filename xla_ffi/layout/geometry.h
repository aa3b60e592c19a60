// How the slots of an arena are cut into segments, the units in which moments move between the
// memory of a GPU and that of the host.
//
// A slot is cut into at most kMaxSegments segments of a power of two of 2 MiB chunks; the last one
// is as long as the slot needs. Segment k of all slots moves together, and the resident segments
// are always the leading ones, so that one number says where everything is.
#pragma once

#include "layout/layout.h"

namespace paged_optax {

inline constexpr int32_t kMaxSlots = 2;
inline constexpr int32_t kMaxSegments = 128;

// Where the slots of an arena lie, for the step. On a GPU kernels read it in device memory.
struct SegmentTable {
  int32_t log2_chunks;   // of a segment
  int32_t num_resident;  // leading segments in device memory
  // Per slot, address of a segment less its offset in the slot: offsets in the slot are added to
  // it.
  uint8_t* bases[kMaxSlots][kMaxSegments];
};

struct Geometry {
  int64_t slot_bytes;
  int32_t num_slots;
  int32_t log2_chunks;

  int64_t SegmentBytes() const { return kChunkBytes << log2_chunks; }
  int32_t NumSegments() const {
    return static_cast<int32_t>((slot_bytes + SegmentBytes() - 1) / SegmentBytes());
  }
  int64_t NumBytes() const { return slot_bytes * num_slots; }
  // Where a segment starts in its slot; that of NumSegments() is the slot's end.
  int64_t Offset(int32_t segment) const {
    const int64_t offset = segment * SegmentBytes();
    return offset < slot_bytes ? offset : slot_bytes;
  }
  // Bytes of the leading segments of all slots.
  int64_t LeadingBytes(int32_t segments) const { return Offset(segments) * num_slots; }
  // Most leading segments that `nbytes` have room for.
  int32_t SegmentsIn(int64_t nbytes) const {
    if (nbytes >= NumBytes()) return NumSegments();
    return nbytes <= 0 ? 0 : static_cast<int32_t>(nbytes / num_slots / SegmentBytes());
  }
};

inline Geometry MakeGeometry(int64_t slot_bytes, int32_t num_slots) {
  Geometry geometry{slot_bytes, num_slots, 0};
  while (geometry.NumSegments() > kMaxSegments) ++geometry.log2_chunks;
  return geometry;
}

}  // namespace paged_optax
