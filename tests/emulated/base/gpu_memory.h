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

// A copy arrives when its thread waits for it, and until then there is nothing to be read.
template <int kBytes>
void CopyAhead(const void* source, void* shared) {
  if (reinterpret_cast<uintptr_t>(source) % kBytes != 0) Fail("a copy is not aligned");
  std::memset(shared, 0xee, kBytes);
  copies[threadIdx.x].push_back({source, shared, kBytes});
}

inline void EndBatch() { copies[threadIdx.x].push_back({}); }

inline void WaitForBatches() {
  std::vector<Copy>& queue = copies[threadIdx.x];
  int num_batches = 0;
  for (const Copy& copy : queue) num_batches += copy.num_bytes == 0;
  while (num_batches > 1) {
    const Copy copy = queue.front();
    queue.erase(queue.begin());
    if (copy.num_bytes != 0) std::memcpy(copy.shared, copy.source, copy.num_bytes);
    num_batches -= copy.num_bytes == 0;
  }
}

}  // namespace paged_optax
