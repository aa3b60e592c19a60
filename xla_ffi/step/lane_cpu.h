// What the CPU adds to the arithmetic of block.h and norm.h: a lane of 256 elements, and its loads.
#pragma once

#include <cstring>

#include "base/dtype.h"
#include "formats/format.h"

namespace paged_optax {

inline constexpr int kCpuLane = static_cast<int>(kBlockSize);

// Of `source`, `count` elements from `start` on, and zeros.
PAGED_HD void LoadBlock(const void* source, DType dtype, int64_t start, int count,
                        float (&values)[kCpuLane]) {
  if (count < kCpuLane) std::memset(values, 0, sizeof(values));
  if (dtype == DType::kFloat32) {
    std::memcpy(values, static_cast<const float*>(source) + start, count * sizeof(float));
    return;
  }
  const uint16_t* halves = static_cast<const uint16_t*>(source) + start;
  if (dtype == DType::kBFloat16) {
    for (int k = 0; k < count; ++k) values[k] = FromBFloat16(halves[k]);
  } else {
    for (int k = 0; k < count; ++k) values[k] = FromFloat16(halves[k]);
  }
}

}  // namespace paged_optax
