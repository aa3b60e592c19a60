// See refusals.h.
#include "state/refusals.h"

#include <algorithm>
#include <utility>

namespace paged_optax {
namespace {

constexpr size_t kMost = 64;  // states that are refused and that nobody looks at

}  // namespace

bool Refusals::Add(Token token, std::string text) {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (const Refused& each : waiting_) {
    if (each.token.handle == token.handle && each.token.version == token.version) return false;
  }
  if (waiting_.size() == kMost) waiting_.pop_front();
  waiting_.push_back({token, std::move(text)});
  count_ = static_cast<int>(waiting_.size());
  return true;
}

std::optional<std::string> Refusals::Take(std::optional<int32_t> handle) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = std::find_if(waiting_.begin(), waiting_.end(), [&](const Refused& each) {
    return !handle || each.token.handle == *handle;
  });
  if (found == waiting_.end()) return std::nullopt;
  std::string text = std::move(found->text);
  const int32_t taken = found->token.handle;
  waiting_.erase(std::remove_if(waiting_.begin(), waiting_.end(),
                                [&](const Refused& each) { return each.token.handle == taken; }),
                 waiting_.end());
  count_ = static_cast<int>(waiting_.size());
  return text;
}

}  // namespace paged_optax
