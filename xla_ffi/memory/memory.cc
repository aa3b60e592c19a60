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

template <class F>
void Memory::ForEachPart(int32_t slot, int64_t offset, int64_t nbytes, const F& body) const {
  for (int64_t done = 0, part; done < nbytes; done += part) {
    const int64_t at = offset + done;
    const int32_t segment = static_cast<int32_t>(at / geometry_.SegmentBytes());
    part = std::min(nbytes - done, geometry_.Offset(segment + 1) - at);
    body(Address(slot, segment) + (at - geometry_.Offset(segment)), done, part);
  }
}

void Memory::Read(int32_t slot, int64_t offset, int64_t nbytes, void* destination) const {
  ForEachPart(slot, offset, nbytes, [&](const uint8_t* address, int64_t done, int64_t part) {
    Copy(address, part, static_cast<uint8_t*>(destination) + done);
  });
}

void Memory::Write(int32_t slot, int64_t offset, int64_t nbytes, const void* source) {
  ForEachPart(slot, offset, nbytes, [&](uint8_t* address, int64_t done, int64_t part) {
    Copy(static_cast<const uint8_t*>(source) + done, part, address);
  });
}

}  // namespace paged_optax
