// The calls between an update whose output is kOpen and the end of its step: they load the arrays
// of some leaves into XLA's memory, and store others in their place.
#pragma once

#include <vector>

#include "xla/handlers.h"

namespace paged_optax {

// paged_optax_load: token s32[2], then for each leaf an array of its shape, which is not read. It
// returns the token, and the leaves' arrays, in f32, bf16 or f16. Attributes: `leaves`, their
// places in the tree; `shards` as in UpdateAttrs, of these leaves.
//
// paged_optax_store: token s32[2], count s32[], then an array a leaf. It returns the token.
// Attributes: `closes`, whether these are the step's last leaves; `keys` of the leaves for random
// bits, empty if nothing is rounded at random; `leaves`; `shards`.
std::vector<HandlerEntry> ArrayHandlers();

}  // namespace paged_optax
