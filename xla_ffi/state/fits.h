// Whether restored moments are those that a step needs.
#pragma once

#include "state/arena.h"
#include "state/source.h"

namespace paged_optax {

// Throws the first difference, for the user.
void CheckFits(const Source& source, const Request& request);

}  // namespace paged_optax
