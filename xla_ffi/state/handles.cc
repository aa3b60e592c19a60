// See handles.h.
#include "state/handles.h"

#include <algorithm>
#include <random>

#include "state/source.h"

namespace paged_optax {
namespace {

constexpr size_t kRecent = 1024;  // executions that may be under way at once, with room to spare

// No process issues handles below, so that a token of zeros is recognised as none.
constexpr int32_t kLeast = 1 << 20;

// Of states that were forgotten: longer and more than updates are queued.
constexpr std::chrono::seconds kGrace{60};
constexpr int64_t kGraceCalls = 32;
constexpr size_t kMaxForgotten = 256, kMaxForgottenSources = 32;

}  // namespace

// Handles start at a random number, so that a token from another process, restored without its
// moments, is recognised instead of finding somebody else's.
Handles::Handles(const Handles* parent)
    : own_{static_cast<int32_t>(std::random_device{}() % (1u << 29) + kLeast), 0} {
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
  const int32_t handle = IssueNext(lock, shared);
  issued_.push_back({run, seed, handle, {device}});
  if (issued_.size() > kRecent) issued_.pop_front();
  return handle;
}

int32_t Handles::IssueNext(const Lock<Handles>&, bool shared) {
  const int32_t handle = (shared && shared_.first != 0 ? shared_ : own_).next++;
  unused_.insert(handle);
  num_unused_ = static_cast<int64_t>(unused_.size());
  return handle;
}

int32_t Handles::Stage(std::shared_ptr<const Source> source, bool shared) {
  const Lock<Handles> lock(mutex_);
  const int32_t handle = IssueNext(lock, shared);
  staged_[handle] = {std::move(source)};
  return handle;
}

std::shared_ptr<const Source> Handles::SourceOf(int32_t handle) const {
  const Lock<Handles> lock(mutex_);
  const auto found = staged_.find(handle);
  return found == staged_.end() ? nullptr : found->second.source;
}

int64_t Handles::NumFilled(int32_t handle) const {
  const Lock<Handles> lock(mutex_);
  const auto found = staged_.find(handle);
  return found == staged_.end() ? 0 : found->second.num_filled;
}

// The caller has the source too, so it does not go here.
void Handles::NoteFilled(const Lock<Handles>&, int32_t handle, int64_t num_devices) {
  const auto found = staged_.find(handle);
  if (found == staged_.end()) return;
  const int64_t local = found->second.source->local_devices;
  const int64_t most = local > 0 ? std::min(local, num_devices) : num_devices;
  if (++found->second.num_filled >= most) staged_.erase(found);
}

bool Handles::IsFirstUse(const Lock<Handles>& lock, int32_t handle, int64_t run) const {
  if (unused_.count(handle)) return true;
  if (handle >= kLeast && IsFromElsewhere(lock, handle) && !adopted_.count(handle)) return true;
  return std::any_of(used_.begin(), used_.end(),
                     [&](const Used& used) { return used.handle == handle && used.run == run; });
}

bool Handles::NoteUsed(const Lock<Handles>& lock, int32_t handle, int64_t run) {
  const bool is_first =
      IsFromElsewhere(lock, handle) ? adopted_.insert(handle).second : unused_.erase(handle) != 0;
  if (!is_first) return false;
  used_.push_back({handle, run});
  if (used_.size() > kRecent) used_.pop_front();
  num_unused_ = static_cast<int64_t>(unused_.size());
  return true;
}

bool Handles::IsFromElsewhere(const Lock<Handles>&, int32_t handle) const {
  return !own_.Contains(handle) && !shared_.Contains(handle) &&
         std::none_of(parents_.begin(), parents_.end(),
                      [&](const Range& range) { return range.Contains(handle); });
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

std::shared_ptr<const Source> Handles::Drop(const Lock<Handles>&, int32_t handle) {
  unused_.erase(handle);
  num_unused_ = static_cast<int64_t>(unused_.size());
  const auto found = staged_.find(handle);
  if (found == staged_.end()) return nullptr;
  const auto source = std::move(found->second.source);
  staged_.erase(found);
  return source;
}

void Handles::Release(int32_t handle) {
  std::shared_ptr<const Source> source;  // outlives the lock
  const Lock<Handles> lock(mutex_);
  source = Drop(lock, handle);
}

bool Handles::Forget(int32_t handle) {
  Sources gone;  // outlive the lock
  const Lock<Handles> lock(mutex_);
  if (unused_.count(handle) == 0) return false;
  const auto is_same = [&](const Forgotten& forgotten) { return forgotten.handle == handle; };
  if (std::none_of(forgotten_.begin(), forgotten_.end(), is_same)) {
    forgotten_.push_back({handle, std::chrono::steady_clock::now(), num_calls_});
    any_forgotten_ = true;
  }
  gone = Sweep(lock);
  return true;
}

void Handles::NoteCall() {
  ++num_calls_;
  if (!any_forgotten_) return;
  Sources gone;  // outlive the lock
  const Lock<Handles> lock(mutex_);
  gone = Sweep(lock);
}

Handles::Sources Handles::Sweep(const Lock<Handles>& lock) {
  Sources gone;
  const auto now = std::chrono::steady_clock::now();
  size_t num_left = forgotten_.size(), num_sources = 0;
  for (const Forgotten& each : forgotten_) num_sources += staged_.count(each.handle);
  std::deque<Forgotten> kept;
  for (const Forgotten& each : forgotten_) {
    const bool is_unused = unused_.count(each.handle) != 0, has_source = staged_.count(each.handle);
    const bool is_over = now - each.time > kGrace && num_calls_ - each.call >= kGraceCalls;
    const bool is_crowded =
        num_left > kMaxForgotten || (has_source && num_sources > kMaxForgottenSources);
    if (is_unused && !is_over && !is_crowded) {
      kept.push_back(each);
      continue;
    }
    --num_left;
    num_sources -= has_source;
    if (is_unused) gone.push_back(Drop(lock, each.handle));
  }
  forgotten_ = std::move(kept);
  any_forgotten_ = !forgotten_.empty();
  return gone;
}

Handles::Origin Handles::OriginOf(int32_t handle) const {
  const Lock<Handles> lock(mutex_);
  if (IsFromElsewhere(lock, handle)) {
    return adopted_.count(handle) ? Origin::kUsed : Origin::kElsewhere;
  }
  if (!own_.Contains(handle) && !shared_.Contains(handle)) return Origin::kParent;
  return unused_.count(handle) ? Origin::kUnused : Origin::kUsed;
}

}  // namespace paged_optax
