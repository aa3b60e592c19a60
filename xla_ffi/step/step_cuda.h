// Launches one optimizer step on a stream.
#pragma once

#include <vector>

#include "base/stream.h"
#include "layout/token.h"
#include "step/step.h"

namespace paged_optax {

// What the first kernel finds out for the others; lies in scratch memory of the call.
struct ResolvedStep {
  AdamStep step;
  ParamStep params;        // where the step takes the parameters
  uint8_t* const* source;  // bases of the segments, as in SegmentTable; nullptr for zeros
  uint8_t* const* target;
  int32_t log2_chunks;      // of a segment
  int64_t resident_blocks;  // of the call's work, the first so many are in device memory
  bool accepted;
};

// All pointers but `leaves` point to device memory or to host memory that the device can access.
struct CudaUpdate {
  Header* headers;
  int num_headers;
  const Token* token;
  const int32_t* count;
  const float* hyperparams;
  const int32_t* part;  // as in Request
  Token* new_token;
  Rejection* rejection;
  ResolvedStep* resolved;
  bool nesterov;
  BadElement bad_element;
  bool takes_params;
  uint64_t fingerprint;
  ArenaExtent extent;
  std::vector<Leaf> leaves;
  int64_t num_work;
};

void LaunchUpdate(const CudaUpdate& update, int device, Stream stream);

// Writes a token that the host knows to device memory.
void LaunchWriteToken(Token token, Token* destination, int device, Stream stream);

// Writes an arena's segment table to device memory.
void LaunchWriteSegments(const SegmentTable& segments, SegmentTable* destination, int device,
                         Stream stream);

}  // namespace paged_optax
