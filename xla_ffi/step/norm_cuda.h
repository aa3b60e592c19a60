// The global norm on a GPU.
#pragma once

#include <cstddef>

#include "base/stream.h"
#include "step/norm.h"

namespace paged_optax {

// Scratch memory that the norm of so many pieces takes.
size_t NormScratchBytes(int32_t num_pieces);

// Writes the norm of the leaves, which are in device memory, to `norm`. `leaves` are on the host.
void LaunchNorm(const NormLeaf* leaves, int64_t num_leaves, int32_t num_pieces, void* scratch,
                float* norm, int device, Stream stream);

}  // namespace paged_optax
