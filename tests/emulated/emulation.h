// What a kernel needs of CUDA, with threads that take turns: the kernels' own source then runs on a
// CPU. A thread runs until it meets the others of its warp or block.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static

struct uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct Place {
  unsigned x;
};
extern Place threadIdx, blockIdx, blockDim, gridDim;

template <class T>
T min(T a, T b) {
  return a < b ? a : b;
}
template <class T>
T max(T a, T b) {
  return a > b ? a : b;
}

void __syncwarp();
void __syncthreads();
uint32_t __shfl_sync(uint32_t mask, uint32_t value, int lane);
uint32_t __reduce_max_sync(uint32_t mask, uint32_t value);
uint32_t __reduce_min_sync(uint32_t mask, uint32_t value);

// Runs `kernel` by `num_threads` threads in each of `num_blocks` blocks, one block after the other.
void Launch(unsigned num_blocks, unsigned num_threads, const std::function<void()>& kernel);

[[noreturn]] void Fail(const char* what);

inline void CheckAligned(const void* address) {
  if (reinterpret_cast<uintptr_t>(address) % 16 != 0) Fail("an access of 16 bytes is not aligned");
}

// Copies of a thread that are under way; one of 0 bytes ends a batch.
struct Copy {
  const void* source;
  void* shared;
  int num_bytes;
};
extern std::vector<Copy> copies[1024];
