// How large a launch is.
#pragma once

#include <algorithm>

#include "base/cuda_check.h"
#include "step/lane_cuda.h"

namespace paged_optax {

// Thread blocks for a kernel whose warps take `num_items` in turn: as many as run at a time, and
// not more than have work. This loads the kernel.
template <class Kernel>
int64_t NumThreadBlocks(Kernel kernel, int64_t num_items, int device) {
  int num_multiprocessors = 0, blocks_per_multiprocessor = 0;
  CUDA_CHECK(cudaDeviceGetAttribute(&num_multiprocessors, cudaDevAttrMultiProcessorCount, device));
  CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks_per_multiprocessor, kernel,
                                                           kThreads, 0));
  return std::min(int64_t{num_multiprocessors} * blocks_per_multiprocessor,
                  (num_items + kWarps - 1) / kWarps);
}

}  // namespace paged_optax
