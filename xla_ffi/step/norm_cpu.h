// The global norm on the CPU.
#pragma once

#include <vector>

#include "step/norm.h"

namespace paged_optax {

// The sum of squares of one piece of a leaf, on the calling thread.
double SumPiece(const NormLeaf& leaf, int32_t piece);

// The norm of all pieces.
float NormOf(const std::vector<double>& pieces);

}  // namespace paged_optax
