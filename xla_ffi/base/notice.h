// Messages for the user from threads that run no Python. Python makes warnings of them, or lines of
// its log.
#pragma once

#include <cstdint>
#include <string>

namespace paged_optax {

struct Notice {
  // A refusal is one that Python raises as soon as it can; the notice comes before that. News are
  // nothing to warn of.
  enum class Kind : int8_t { kOther, kRefusal, kNews };

  int ordinal;            // of the GPU
  int64_t missing_bytes;  // device bytes that the moments lack; 0 if it is not about memory
  std::string text;
  Kind kind = Kind::kOther;
};

// Never blocks for long, whatever locks the caller holds.
void PostNotice(Notice notice);

}  // namespace paged_optax
