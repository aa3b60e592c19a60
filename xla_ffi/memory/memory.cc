// See memory.h: what all kinds of memory have in common.
#include "memory/memory.h"

#include <algorithm>

namespace paged_optax {

const char* Name(MemoryKind kind) {
  switch (kind) {
    case MemoryKind::kAnonymous:
      return "host";
    case MemoryKind::kFile:
      return "file";
    case MemoryKind::kManaged:
      return "managed";
    case MemoryKind::kPinned:
      return "pinned";
  }
  return "";
}

SegmentTable Memory::Table(int32_t num_resident) const {
  SegmentTable table{geometry_.log2_chunks, num_resident, {}};
  for (int32_t slot = 0; slot < geometry_.num_slots; ++slot) {
    for (int32_t segment = 0; segment < geometry_.NumSegments(); ++segment) {
      table.bases[slot][segment] = Address(slot, segment) - geometry_.Offset(segment);
    }
  }
  return table;
}

void Memory::Read(int32_t slot, int64_t offset, int64_t nbytes, void* destination) const {
  for (int64_t done = 0, part; done < nbytes; done += part) {
    const int64_t at = offset + done;
    const int32_t segment = static_cast<int32_t>(at / geometry_.SegmentBytes());
    part = std::min(nbytes - done, geometry_.Offset(segment + 1) - at);
    Copy(Address(slot, segment) + (at - geometry_.Offset(segment)), part,
         static_cast<uint8_t*>(destination) + done);
  }
}

}  // namespace paged_optax
