// What a GPU adds to the arithmetic of block.h, array.h and norm.h: a thread's lane of 8 elements,
// its loads and stores, the extremes of a warp's block, and what a thread block has in common.
#pragma once

#include <type_traits>

#include "base/gpu_memory.h"
#include "layout/small_codes.h"
#include "step/block.h"

namespace paged_optax {

inline constexpr int kWarpSize = 32;
inline constexpr int kLane = static_cast<int>(kBlockSize) / kWarpSize;  // elements of a thread
inline constexpr int kThreads = 256;
inline constexpr int kWarps = kThreads / kWarpSize;

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

// Four floats from number `k` on, as they lie in memory.
__device__ inline uint4 PackFloats(const float (&values)[kLane], int k) {
  return {BitsOf(values[k]), BitsOf(values[k + 1]), BitsOf(values[k + 2]), BitsOf(values[k + 3])};
}

__device__ inline void UnpackFloats(uint4 v, int k, float (&values)[kLane]) {
  values[k] = FloatOf(v.x);
  values[k + 1] = FloatOf(v.y);
  values[k + 2] = FloatOf(v.z);
  values[k + 3] = FloatOf(v.w);
}

// All of a thread's numbers of 16 bits.
__device__ inline void UnpackHalves(uint4 v, DType dtype, float (&values)[kLane]) {
  const uint32_t pairs[] = {v.x, v.y, v.z, v.w};
  if (dtype == DType::kBFloat16) {
#pragma unroll
    for (int k = 0; k < kLane; k += 2) {
      values[k] = FloatOf(pairs[k / 2] << 16);
      values[k + 1] = FloatOf(pairs[k / 2] & 0xffff0000u);
    }
  } else {
#pragma unroll
    for (int k = 0; k < kLane; k += 2) {
      values[k] = FromFloat16(static_cast<uint16_t>(pairs[k / 2]));
      values[k + 1] = FromFloat16(static_cast<uint16_t>(pairs[k / 2] >> 16));
    }
  }
}

__device__ inline uint4 PackHalves(DType dtype, const float (&values)[kLane]) {
  uint32_t pairs[kLane / 2];
  if (dtype == DType::kBFloat16) {
#pragma unroll
    for (int k = 0; k < kLane; k += 2) pairs[k / 2] = ToBFloat16Pair(values[k], values[k + 1]);
  } else {
#pragma unroll
    for (int k = 0; k < kLane; k += 2) {
      pairs[k / 2] = static_cast<uint32_t>(ToFloat16(values[k + 1])) << 16 | ToFloat16(values[k]);
    }
  }
  return {pairs[0], pairs[1], pairs[2], pairs[3]};
}

// All of a thread's floats; aligned.
__device__ inline void LoadFloats(const float* source, float (&values)[kLane]) {
#pragma unroll
  for (int k = 0; k < kLane; k += 4) UnpackFloats(LoadVector(source + k), k, values);
}

__device__ inline void StoreFloats(const float (&values)[kLane], float* target) {
#pragma unroll
  for (int k = 0; k < kLane; k += 4) StoreVector(PackFloats(values, k), target + k);
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
  uint32_t pairs[kLane / 2];
  if (count == kLane && IsAligned(source)) {
    UnpackHalves(LoadVector(source), dtype, values);
    return;
  }
#pragma unroll
  for (int k = 0; k < kLane; k += 2) {
    const uint32_t low = k < count ? source[k] : 0u, high = k + 1 < count ? source[k + 1] : 0u;
    pairs[k / 2] = high << 16 | low;
  }
  UnpackHalves({pairs[0], pairs[1], pairs[2], pairs[3]}, dtype, values);
}

// All of a thread's elements, from `start` on; aligned.
__device__ inline void StoreAll(const float (&values)[kLane], void* results, DType dtype,
                                int64_t start) {
  if (dtype == DType::kFloat32) {
    StoreFloats(values, static_cast<float*>(results) + start);
  } else {
    StoreVector(PackHalves(dtype, values), static_cast<uint16_t*>(results) + start);
  }
}

__device__ inline void Store(void* results, DType dtype, int64_t start, int count,
                             const float (&values)[kLane]) {
  void* target = static_cast<uint8_t*>(results) + start * SizeOf(dtype);
  if (count == kLane && IsAligned(target)) return StoreAll(values, results, dtype, start);
  if (dtype == DType::kFloat32) {
#pragma unroll
    for (int k = 0; k < kLane; ++k) {
      if (k < count) static_cast<float*>(target)[k] = values[k];
    }
    return;
  }
  const uint4 packed = PackHalves(dtype, values);
  const uint32_t pairs[] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
  for (int k = 0; k < kLane; ++k) {
    if (k < count) {
      static_cast<uint16_t*>(target)[k] = static_cast<uint16_t>(pairs[k / 2] >> (k % 2 * 16));
    }
  }
}

__device__ inline void Store(const Leaf& leaf, int64_t start, int count,
                             const float (&values)[kLane]) {
  Store(leaf.results, leaf.result_dtype, start, count, values);
}

// The distance, in an arena, from the codes of one thread to those of the next. Of codes of 4 or
// 6 bits, that of their lower bits.
template <class Format>
inline constexpr int kLaneBytes =
    kHasSmallCodes<Format> ? kLane / 2 : kLane * static_cast<int>(sizeof(typename Format::Code));

__device__ inline void PutCodes(uint32_t lower, uint32_t upper, uint8_t (&codes)[kLane]) {
  const EightCodes eight = UnpackEight(lower, upper);
  *reinterpret_cast<uint2*>(&codes[0]) = {eight.first, eight.last};
}

// Where the upper bits of a thread's codes of 6 bits are, if their lower bits are at `codes`.
template <class Byte>
__device__ inline Byte* UpperBitsOf(Byte* codes, int thread) {
  return codes + (kUpperBits - 2 * thread);
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

// The codes of a thread, at `source` in an arena, and what copies ahead have of them in shared
// memory: codes of 4 or 6 bits are the four bytes with their lower bits, and four with the upper
// bits of this thread and its neighbour if there are any.
template <class Format>
__device__ inline void LoadLaneCodes(const uint8_t* source, int thread,
                                     typename Format::Code (&codes)[kLane]) {
  if constexpr (kHasSmallCodes<Format>) {
    uint32_t upper = 0;
    if constexpr (kHasUpperBits<Format>) {
      upper = *reinterpret_cast<const uint16_t*>(UpperBitsOf(source, thread));
    }
    PutCodes(*reinterpret_cast<const uint32_t*>(source), upper, codes);
  } else {
    LoadCodes(source, codes);
  }
}

template <class Format>
__device__ inline void StoreLaneCodes(const typename Format::Code (&codes)[kLane], int thread,
                                      uint8_t* target) {
  if constexpr (kHasSmallCodes<Format>) {
    const uint2 bytes = *reinterpret_cast<const uint2*>(&codes[0]);
    const EightCodes eight{bytes.x, bytes.y};
    *reinterpret_cast<uint32_t*>(target) = LowerBits(eight);
    if constexpr (kHasUpperBits<Format>) {
      *reinterpret_cast<uint16_t*>(UpperBitsOf(target, thread)) =
          static_cast<uint16_t>(UpperBits(eight));
    }
  } else {
    StoreCodes(codes, target);
  }
}

template <class Format>
__device__ inline void CopyCodesAhead(const uint8_t* source, int thread, uint8_t (&copy)[kLane]) {
  if constexpr (kHasSmallCodes<Format>) {
    CopyAhead<4>(source, &copy[0]);
    if constexpr (kHasUpperBits<Format>) {
      CopyAhead<4>(UpperBitsOf(source, thread) - 2 * (thread & 1), &copy[4]);
    }
  } else {
    CopyAhead<kLane>(source, copy);
  }
}

template <class Format>
__device__ inline void TakeCodes(const uint8_t (&copy)[kLane], int thread,
                                 typename Format::Code (&codes)[kLane]) {
  if constexpr (kHasUpperBits<Format>) {
    const uint2 bytes = *reinterpret_cast<const uint2*>(&copy[0]);
    PutCodes(bytes.x, bytes.y >> 16 * (thread & 1) & 0xffffu, codes);
  } else if constexpr (kHasSmallCodes<Format>) {
    PutCodes(*reinterpret_cast<const uint32_t*>(&copy[0]), 0, codes);
  } else {
    LoadCodes(copy, codes);
  }
}

// The tables of a format, for each thread block to copy into shared memory.
template <class Format>
__device__ constexpr auto kTables = Format::template MakeTables<uint8_t>();

template <class Format, class Tables>
__device__ void FillTables(Tables& tables) {
  if constexpr (!std::is_empty_v<Tables>) {
    static_assert(sizeof(Tables) % sizeof(float) == 0);
    for (int i = threadIdx.x; i < static_cast<int>(sizeof(Tables) / sizeof(float)); i += kThreads) {
      reinterpret_cast<float*>(&tables)[i] = reinterpret_cast<const float*>(&kTables<Format>)[i];
    }
  }
}

}  // namespace paged_optax
