// Fills a new arena with the moments that its state was restored with.
#pragma once

#include "state/arena.h"
#include "state/source.h"

namespace paged_optax {

// Throws the first thing in which the moments differ from what a step needs, before anything is
// allocated.
void CheckFits(const Source& source, const Request& request);

// Writes the request's parts of the leaves into slot 0 of an arena whose memory is there, and gives
// it version 1. No step may run. Where a block has the elements of a stored block, in its order and
// format, it keeps every bit; other blocks are decoded and encoded again, to nearest. Residuals
// keep every bit. Throws if data cannot be read or have values that no step stores.
void Fill(const Source& source, const Request& request, Arena& arena);

}  // namespace paged_optax
