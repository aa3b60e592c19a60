// The XLA call of the global norm.
#pragma once

#include <vector>

#include "xla/handlers.h"

namespace paged_optax {

std::vector<HandlerEntry> NormHandlers();

}  // namespace paged_optax
