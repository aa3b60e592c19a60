// Launches one optimizer step on a stream.
#pragma once

#include <array>

#include "base/stream.h"
#include "layout/token.h"
#include "step/block.h"

namespace paged_optax {

// What the first kernel finds out for the others; lies in scratch memory of the call.
struct ResolvedStep {
  AnyStep step;
  uint8_t* const* source;  // bases of the segments, as in SegmentTable; nullptr for zeros
  uint8_t* const* target;
  int32_t log2_chunks;                       // of a segment
  int64_t resident_blocks[kFormats.size()];  // so many of each region's first blocks
  bool accepted;
  // Of the arena, if accepted: its header, as it was before, and the slot that the step writes.
  Header* header;
  Header before;
  int32_t target_slot;
};

// What a kernel is given: the blocks of one region.
struct RegionStep {
  const ResolvedStep* resolved;
  const Leaf* leaves;  // of the region, in the order of their blocks
  int64_t num_leaves;
  Region region;
  int32_t format;
  Output output;
};

// The blocks of one region in a call.
struct RegionWork {
  Region region;
  int64_t first_leaf, num_leaves;
};

// All pointers but `leaves` point to device memory or to host memory that the device can access.
struct CudaUpdate {
  Header* headers;
  int num_headers;
  Rejection* rejection;
  void* scratch;  // ScratchBytes
  const Token* token;
  const int32_t* count;
  const float* hyperparams;
  const int32_t* part;  // as in Request
  Token* new_token;
  StepKind kind;
  uint64_t fingerprint;
  const Leaf* leaves;  // of all regions, in their order; on the host
  std::array<RegionWork, kFormats.size()> regions;
};

inline constexpr size_t kScratchAlignment = 16;
size_t ScratchBytes(size_t num_leaves);

// If a launch fails, no step is made; or, after some of it ran, its contents count for nothing. The
// error says which.
void LaunchUpdate(const CudaUpdate& update, int device, Stream stream);

// Writes a token that the host knows to device memory.
void LaunchWriteToken(Token token, Token* destination, int device, Stream stream);

// Writes an arena's segment table to device memory.
void LaunchWriteSegments(const SegmentTable& segments, SegmentTable* destination, int device,
                         Stream stream);

}  // namespace paged_optax
