// Launches one optimizer step on a stream. Implemented by step_cuda.cu, called by the CUDA handler
// in module.cc.
#pragma once

#include <vector>

#include "step.h"
#include "token.h"

namespace paged_optax {

// What the first kernel finds out for the others; lies in scratch memory of the call.
struct ResolvedStep {
  AdamStep step;
  ParamStep params;       // where the step takes the parameters
  const uint8_t* source;  // as in Work
  uint8_t* target;
  bool accepted;
};

// All pointers but `leaves` point to device memory or to host memory that the device can access.
struct CudaUpdate {
  Header* headers;
  int num_headers;
  const Token* token;
  const int32_t* count;
  const float* hyperparams;
  Token* new_token;
  Rejection* rejection;
  ResolvedStep* resolved;
  bool nesterov;
  BadElement bad_element;
  bool takes_params;
  uint64_t layout;
  ArenaExtent extent;
  std::vector<Leaf> leaves;
  int64_t num_work;
};

void LaunchUpdate(const CudaUpdate& update, int device, void* stream);

// Writes a token that the host knows to device memory.
void LaunchWriteToken(Token token, Token* destination, int device, void* stream);

// Number of float32 arguments for which fast_math.h is wrong where it claims to be exact; for the
// tests.
int64_t CountInexact(int device);

}  // namespace paged_optax
