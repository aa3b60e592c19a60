// Steps that were refused, until somebody in Python has been told: no compiled program is ever
// failed for one.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <mutex>
#include <optional>
#include <string>

#include "layout/token.h"

namespace paged_optax {

class Refusals {
 public:
  // Keeps a refusal, unless one of the same token waits already; returns whether it does.
  bool Add(Token token, std::string text);

  // Whether one waits. Takes no lock.
  bool any() const { return count_ > 0; }

  // The text of the oldest that waits: of this handle, or of any. Those of the same handle go too:
  // whoever is told of one looks for the reason of all.
  std::optional<std::string> Take(std::optional<int32_t> handle);

 private:
  struct Refused {
    Token token;
    std::string text;
  };

  std::mutex mutex_;
  std::deque<Refused> waiting_;  // oldest first
  std::atomic<int> count_{0};
};

}  // namespace paged_optax
