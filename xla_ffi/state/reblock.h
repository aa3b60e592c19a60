// Fills a leaf of an arena whose boxes or format are not those in which its moments are stored.
#pragma once

#include "state/leaf_work.h"

namespace paged_optax {

// Blocks that have the elements of a stored block, in its order and format, keep every bit. The
// others are decoded and encoded again, to nearest. Residuals keep every bit. Holds what is stored
// of the leaf in memory.
void Reblock(const LeafWork& work);

}  // namespace paged_optax
