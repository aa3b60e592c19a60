// What the tests' module has of CUDA.
#pragma once

#include <cstdint>

namespace paged_optax {

// Number of float32 arguments for which fast_math.h is wrong where it claims to be exact, or for
// which the GPU rounds to bfloat16 in another way than the CPU.
int64_t CountInexact(int device);

}  // namespace paged_optax
