// The calls between an update whose output is kOpen and the end of its step: they load the arrays
// of some leaves into XLA's memory, and store others in their place.
#pragma once

#include <vector>

#include "xla/handlers.h"

namespace paged_optax {

// paged_optax_load: token s32[2], then for each leaf an array of its shape, which is not read. It
// returns the token, and the leaves' arrays, in f32, bf16 or f16.
// paged_optax_store: token s32[2], count s32[], then an array a leaf. It returns the token.
//
// Attributes of both: `leaves`, their places in the tree; of each, `formats` and (unless nothing is
// rounded at random) `keys`; `shards` as in UpdateAttrs, of these leaves; `closes`, whether the
// step ends with this store.
std::vector<HandlerEntry> ArrayHandlers();

}  // namespace paged_optax
