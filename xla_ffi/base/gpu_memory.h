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

}  // namespace paged_optax
