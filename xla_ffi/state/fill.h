// Fills a new arena with the moments that its state was restored with.
#pragma once

#include "state/arena.h"
#include "state/source.h"

namespace paged_optax {

// Writes the request's parts of the leaves, for which CheckFits has passed, into slot 0 of an arena
// whose memory is there, and gives it version 1. No step may run. Where a block has the elements of
// a stored block, in its order and format, it keeps every bit; other blocks are decoded and encoded
// again, to nearest. Residuals keep every bit. Throws if data cannot be read or have values that no
// step stores.
void Fill(const Source& source, const Request& request, Arena& arena);

}  // namespace paged_optax
