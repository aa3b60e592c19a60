// Fetching ahead on the GPU: while a warp works on a block, the next one is on its way from global
// to shared memory. A block takes about a thousand instructions, in which no other load is under
// way that the warp could wait for: registers for the next block would cost more warps than they
// save.
//
// Each thread copies and reads the same bytes, those of its lane. So threads wait for nobody, and
// what a thread reads has arrived once it has waited for its own copies.
#pragma once

#include "step/lane_cuda.h"

namespace paged_optax {

// What a warp fetches of a block: gradients, parameters, and the codes of each state (lane_cuda.h).
// A thread's halves of 16 bytes lie apart, so that a warp reads each half without bank conflicts.
struct FetchedArray {
  alignas(16) uint8_t halves[kLane / 4][kWarpSize][16];
};

template <bool kWithParams, int kStates>
struct FetchedBlock {
  static constexpr bool kHasParams = kWithParams;
  static constexpr int kNumStates = kStates;
  FetchedArray grads;
  std::conditional_t<kWithParams, FetchedArray, NoTables> params;
  alignas(16) uint8_t codes[kWarpSize][kStates][kLane];
};

// Bytes of a block in the arrays of a leaf. In shared memory: registers are short.
struct BlockBytes {
  uint32_t grads, params;
};

__device__ inline BlockBytes BlockBytesOf(const Leaf& leaf) {
  return {static_cast<uint32_t>(SizeOf(leaf.dtype) * kBlockSize),
          static_cast<uint32_t>(SizeOf(leaf.param_dtype) * kBlockSize)};
}

__device__ inline bool IsFloat32(uint32_t block_bytes) {
  return block_bytes == kBlockSize * sizeof(float);
}

// Where the elements of a thread are in an array of a leaf: in block 0 of the group, or would be,
// if it has those from `start` on in block i.
__device__ inline const uint8_t* FirstOf(const void* data, DType dtype, int64_t start, int i) {
  const int64_t offset = (start - i * kBlockSize) * SizeOf(dtype);
  return reinterpret_cast<const uint8_t*>(reinterpret_cast<uintptr_t>(data) + offset);
}

__device__ inline void Fetch(const uint8_t* first, uint32_t block_bytes, int i, int thread,
                             FetchedArray& array) {
  const uint8_t* elements = first + uint64_t{static_cast<uint32_t>(i)} * block_bytes;
  CopyAhead<16>(elements, array.halves[0][thread]);
  if (IsFloat32(block_bytes)) CopyAhead<16>(elements + 16, array.halves[1][thread]);
}

__device__ inline void Take(const FetchedArray& array, DType dtype, int thread,
                            float (&values)[kLane]) {
  const auto half = [&](int i) { return *reinterpret_cast<const uint4*>(array.halves[i][thread]); };
  if (dtype == DType::kFloat32) {
    UnpackFloats(half(0), 0, values);
    UnpackFloats(half(1), 4, values);
  } else {
    UnpackHalves(half(0), dtype, values);
  }
}

}  // namespace paged_optax
