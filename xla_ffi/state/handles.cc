// See handles.h.
#include "state/handles.h"

#include <algorithm>
#include <random>

namespace paged_optax {
namespace {

constexpr size_t kRecent = 1024;  // executions that may be under way at once, with room to spare

}  // namespace

// Handles start at a random number, so that a token from another process, restored without its
// moments, is recognised instead of finding somebody else's.
Handles::Handles(const Handles* parent)
    : own_{static_cast<int32_t>(std::random_device{}() % (1u << 29) + (1u << 20)), 0} {
  own_.next = own_.first;
  if (parent == nullptr) return;
  parents_ = parent->parents_;
  parents_.push_back(parent->own_);
  parents_.push_back(parent->shared_);
}

// Above all handles that a process issues on its own.
void Handles::SetSharedBase(int32_t random) {
  const Lock<Handles> lock(mutex_);
  if (shared_.first != 0) return;
  shared_.first = shared_.next = (1 << 30) + (random & ((1 << 29) - 1));
}

int32_t Handles::Issue(DeviceId device, int64_t run, int32_t seed, bool shared) {
  const Lock<Handles> lock(mutex_);
  for (Issued& issued : issued_) {
    if (issued.run == run && issued.seed == seed && issued.devices.insert(device).second) {
      return issued.handle;
    }
  }
  const int32_t handle = (shared && shared_.first != 0 ? shared_ : own_).next++;
  issued_.push_back({run, seed, handle, {device}});
  if (issued_.size() > kRecent) issued_.pop_front();
  unused_.insert(handle);
  num_unused_ = static_cast<int64_t>(unused_.size());
  return handle;
}

bool Handles::IsFirstUse(const Lock<Handles>&, int32_t handle, int64_t run) const {
  return unused_.count(handle) || std::any_of(used_.begin(), used_.end(), [&](const Used& used) {
           return used.handle == handle && used.run == run;
         });
}

void Handles::NoteUsed(const Lock<Handles>&, int32_t handle, int64_t run) {
  if (unused_.erase(handle) == 0) return;
  used_.push_back({handle, run});
  if (used_.size() > kRecent) used_.pop_front();
  num_unused_ = static_cast<int64_t>(unused_.size());
}

std::vector<int32_t> Handles::Unused() const {
  const Lock<Handles> lock(mutex_);
  return {unused_.begin(), unused_.end()};
}

std::vector<int32_t> Handles::FirstUsedIn(int64_t run) const {
  const Lock<Handles> lock(mutex_);
  std::vector<int32_t> handles;
  for (const Used& used : used_) {
    if (used.run == run) handles.push_back(used.handle);
  }
  return handles;
}

void Handles::Forget(int32_t handle) {
  const Lock<Handles> lock(mutex_);
  unused_.erase(handle);
  num_unused_ = static_cast<int64_t>(unused_.size());
}

Handles::Origin Handles::OriginOf(int32_t handle) const {
  const Lock<Handles> lock(mutex_);
  if (!own_.Contains(handle) && !shared_.Contains(handle)) {
    const bool is_parents = std::any_of(parents_.begin(), parents_.end(),
                                        [&](const Range& range) { return range.Contains(handle); });
    return is_parents ? Origin::kParent : Origin::kElsewhere;
  }
  return unused_.count(handle) ? Origin::kUnused : Origin::kUsed;
}

}  // namespace paged_optax
