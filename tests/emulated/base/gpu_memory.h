// In place of xla_ffi/base/gpu_memory.h.
#pragma once

#include "emulation.h"

namespace paged_optax {

inline uint4 LoadVector(const void* source) {
  CheckAligned(source);
  return *static_cast<const uint4*>(source);
}

inline void StoreVector(uint4 v, void* target) {
  CheckAligned(target);
  *static_cast<uint4*>(target) = v;
}

}  // namespace paged_optax
