// Where a leaf of the rule "array" lies, for calls that know its number and not the whole tree.
#pragma once

#include "layout/layout.h"

namespace paged_optax {

struct ArrayPlace {
  Region region;
  int64_t first_block;  // in the region
  int64_t size;         // elements
  uint64_t stamp;       // of its shape, and of how it is cut over devices
  int64_t format;       // a place in Formats
};

}  // namespace paged_optax
