// What a thread of a warp adds to the arithmetic of block.h on a GPU: a lane of 8 elements, its
// loads and stores, and the extremes of the block.
#pragma once

#include "step/block.h"

namespace paged_optax {

inline constexpr int kWarpSize = 32;
inline constexpr int kLane = static_cast<int>(kBlockSize) / kWarpSize;  // elements of a thread

struct Warp {
  __device__ uint32_t Max(uint32_t lane_max) const {
    return __reduce_max_sync(0xffffffffu, lane_max);
  }
  __device__ uint32_t Min(uint32_t lane_min) const {
    return __reduce_min_sync(0xffffffffu, lane_min);
  }
};

// XLA aligns buffers, and slices that it hands over; this is for the case that it does not.
__device__ inline bool IsAligned(const void* address) {
  return reinterpret_cast<uintptr_t>(address) % 16 == 0;
}

// All of a thread's floats at once; aligned.
__device__ inline void LoadFloats(const float* source, float (&values)[kLane]) {
#pragma unroll
  for (int k = 0; k < kLane; k += 4) {
    *reinterpret_cast<float4*>(&values[k]) = *reinterpret_cast<const float4*>(source + k);
  }
}

__device__ inline void StoreFloats(const float (&values)[kLane], float* target) {
#pragma unroll
  for (int k = 0; k < kLane; k += 4) {
    *reinterpret_cast<float4*>(target + k) = *reinterpret_cast<const float4*>(&values[k]);
  }
}

// Of `data`, `count` elements from `start` on, and zeros.
__device__ inline void Load(const void* data, DType dtype, int64_t start, int count,
                            float (&values)[kLane]) {
  if (dtype == DType::kFloat32) {
    const float* source = static_cast<const float*>(data) + start;
    if (count == kLane && IsAligned(source)) {
      LoadFloats(source, values);
      return;
    }
#pragma unroll
    for (int k = 0; k < kLane; ++k) values[k] = k < count ? source[k] : 0.0f;
    return;
  }
  const uint16_t* source = static_cast<const uint16_t*>(data) + start;
  uint4 packed = {0, 0, 0, 0};
  uint16_t* halves = reinterpret_cast<uint16_t*>(&packed);
  if (count == kLane && IsAligned(source)) {
    packed = *reinterpret_cast<const uint4*>(source);
  } else {
#pragma unroll
    for (int k = 0; k < kLane; ++k) halves[k] = k < count ? source[k] : uint16_t{0};
  }
  if (dtype == DType::kBFloat16) {
#pragma unroll
    for (int k = 0; k < kLane; ++k) values[k] = FromBFloat16(halves[k]);
  } else {
#pragma unroll
    for (int k = 0; k < kLane; ++k) values[k] = FromFloat16(halves[k]);
  }
}

__device__ inline void Store(void* results, DType dtype, int64_t start, int count,
                             const float (&values)[kLane]) {
  if (dtype == DType::kFloat32) {
    float* target = static_cast<float*>(results) + start;
    if (count == kLane && IsAligned(target)) {
      StoreFloats(values, target);
      return;
    }
#pragma unroll
    for (int k = 0; k < kLane; ++k) {
      if (k < count) target[k] = values[k];
    }
    return;
  }
  uint4 packed;
  uint16_t* halves = reinterpret_cast<uint16_t*>(&packed);
  if (dtype == DType::kBFloat16) {
#pragma unroll
    for (int k = 0; k < kLane; ++k) halves[k] = ToBFloat16(values[k]);
  } else {
#pragma unroll
    for (int k = 0; k < kLane; ++k) halves[k] = ToFloat16(values[k]);
  }
  uint16_t* target = static_cast<uint16_t*>(results) + start;
  if (count == kLane && IsAligned(target)) {
    *reinterpret_cast<uint4*>(target) = packed;
    return;
  }
#pragma unroll
  for (int k = 0; k < kLane; ++k) {
    if (k < count) target[k] = halves[k];
  }
}

__device__ inline void Store(const Leaf& leaf, int64_t start, int count,
                             const float (&values)[kLane]) {
  Store(leaf.results, leaf.result_dtype, start, count, values);
}

// The codes of a state, of 1, 2 or 4 bytes each; aligned.
__device__ inline void LoadCodes(const uint8_t* source, uint8_t (&codes)[kLane]) {
  *reinterpret_cast<uint2*>(&codes[0]) = *reinterpret_cast<const uint2*>(source);
}

__device__ inline void LoadCodes(const uint8_t* source, float (&codes)[kLane]) {
  LoadFloats(reinterpret_cast<const float*>(source), codes);
}

__device__ inline void LoadCodes(const uint8_t* source, uint16_t (&codes)[kLane]) {
  *reinterpret_cast<uint4*>(&codes[0]) = *reinterpret_cast<const uint4*>(source);
}

__device__ inline void StoreCodes(const uint16_t (&codes)[kLane], uint8_t* target) {
  *reinterpret_cast<uint4*>(target) = *reinterpret_cast<const uint4*>(&codes[0]);
}

__device__ inline void StoreCodes(const uint8_t (&codes)[kLane], uint8_t* target) {
  *reinterpret_cast<uint2*>(target) = *reinterpret_cast<const uint2*>(&codes[0]);
}

__device__ inline void StoreCodes(const float (&codes)[kLane], uint8_t* target) {
  StoreFloats(codes, reinterpret_cast<float*>(target));
}

}  // namespace paged_optax
