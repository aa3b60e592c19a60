// Instructions of a GPU's memory that the compiler does not find by itself.
#pragma once

#include <cstdint>

namespace paged_optax {

// 16 bytes of global memory in one instruction. In assembly, because the compiler takes an
// assignment of 16 bytes apart: results were stored 4 bytes at a time, by threads 16 or 32 bytes
// apart.
__device__ inline uint4 LoadVector(const void* source) {
  uint4 v;
  asm volatile("ld.global.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(__cvta_generic_to_global(source)));
  return v;
}

__device__ inline void StoreVector(uint4 v, void* target) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(target)),
               "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

// `kBytes` (4, 8 or 16) from global memory; aligned to them. The thread goes on at once.
template <int kBytes>
__device__ inline void CopyAhead(const void* source, void* shared) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
               "l"(__cvta_generic_to_global(source)), "n"(kBytes)
               : "memory");
}

// Ends a batch of copies, which may be empty.
__device__ inline void EndBatch() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for all batches of the thread but the last one.
__device__ inline void WaitForBatches() { asm volatile("cp.async.wait_group 1;" ::: "memory"); }

}  // namespace paged_optax
