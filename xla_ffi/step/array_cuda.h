// Loads and stores arrays on a GPU.
#pragma once

#include <vector>

#include "base/dtype.h"
#include "base/stream.h"
#include "layout/token.h"

namespace paged_optax {

// An array in XLA's memory.
struct CudaArray {
  void* data;
  int64_t size;
  int64_t begin;   // its first block among those of a launch
  uint64_t stamp;  // as in ArrayPlace
  uint64_t key;    // to store: of the leaf's random bits
  int32_t leaf;    // its place in the tree
  DType dtype;
  int8_t format;
};

// Pointers are to device memory, or to host memory that the device can access.
struct CudaArrayCall {
  Header* headers;
  int32_t num_headers;
  Reports* reports;
  const Token* token;
  Token* new_token;
  const int32_t* count;  // null to load
};

// Before a step that leaves of these formats belong to is opened: what can fail later, for want of
// memory for instance, fails here, while the moments are whole. This loads the kernels.
void PrepareArrays(const std::vector<int>& formats, int device);

// If the token's step was refused when it began, this loads zeros and stores nothing. So it does,
// reports it and returns LostToken, if another step took the slot meanwhile.
void LaunchArrays(const CudaArrayCall& call, std::vector<CudaArray> arrays, int device,
                  Stream stream);

// Ends the step, after all its arrays were stored.
void LaunchClose(const CudaArrayCall& call, int device, Stream stream);

}  // namespace paged_optax
