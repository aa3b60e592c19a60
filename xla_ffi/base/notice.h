// Word to the user from where no Python runs. Posted by arena.cc and pager.cc; module.cc makes
// Python warnings of it.
#pragma once

#include <cstdint>
#include <string>

namespace paged_optax {

struct Notice {
  int ordinal;  // of the GPU
  int64_t
      missing_bytes;  // of its memory that moments would take and cannot have; 0: something else
  std::string text;
};

// Never blocks for long, whatever locks the caller holds.
void PostNotice(Notice notice);

}  // namespace paged_optax
