// See handles.h.
#include "state/handles.h"

#include <algorithm>
#include <limits>
#include <random>

#include "state/source.h"

namespace paged_optax {
namespace {

// Executions that may be under way at once, with room to spare; fewer if they issued very many
// handles.
constexpr size_t kRecent = 1024, kFewRecent = 16;
constexpr int64_t kManyIssued = int64_t{1} << 20;

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
  shared_.reserve(64);  // a process that is forked meanwhile finds them whole
  if (parent == nullptr) return;
  parents_ = parent->parents_;
  parents_.push_back(parent->own_);
  parents_.insert(parents_.end(), parent->shared_.begin(), parent->shared_.end());
}

// Above all handles that a process issues on its own.
void Handles::SetSharedBase(int32_t random) {
  const Lock<Handles> lock(mutex_);
  const int32_t first = (1 << 30) + (random & ((1 << 29) - 1));
  shared_.push_back({first, first});
}

Handles::Run& Handles::RunOf(const Lock<Handles>&, int64_t run) {
  const auto [found, is_new] = runs_.try_emplace(run);
  if (!is_new) return found->second;
  order_.push_back(run);
  while (order_.size() > kRecent || (order_.size() > kFewRecent && num_issued_ > kManyIssued)) {
    const auto oldest = runs_.find(order_.front());
    for (const auto& [site, issued] : oldest->second.issued) {
      num_issued_ -= static_cast<int64_t>(issued.handles.size());
    }
    runs_.erase(oldest);
    order_.pop_front();
  }
  return found->second;
}

int32_t Handles::Issue(DeviceId device, int64_t run, CallSite site, bool shared) {
  const Lock<Handles> lock(mutex_);
  Issued& issued = RunOf(lock, run).issued[site];
  size_t& next = issued.next[device];
  if (next == issued.handles.size()) {
    issued.handles.push_back(IssueNext(lock, shared));
    ++num_issued_;
  }
  return issued.handles[next++];
}

int32_t Handles::IssueNext(const Lock<Handles>&, bool shared) {
  const int32_t handle = (shared && !shared_.empty() ? shared_.back() : own_).next++;
  unused_.emplace(handle, std::chrono::steady_clock::now());
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
void Handles::NoteFilled(int32_t handle, int64_t run, int64_t num_devices) {
  const Lock<Handles> lock(mutex_);
  if (undone_.count({handle, run}) != 0) return;  // meanwhile, by another device
  const auto found = staged_.find(handle);
  if (found == staged_.end()) return;
  const int64_t local = found->second.source->local_devices;
  const int64_t most = local > 0 ? std::min(local, num_devices) : num_devices;
  if (++found->second.num_filled >= most) staged_.erase(found);
}

Handles::Claim Handles::ClaimFirstUse(int32_t handle, int64_t run) {
  const Lock<Handles> lock(mutex_);
  const auto undone = undone_.find({handle, run});
  if (undone != undone_.end()) {
    throw StatusError(undone->second.code,
                      "the first step of this optimizer state failed on another device, so that "
                      "no device keeps moments of it: " +
                          undone->second.why);
  }
  const bool is_elsewheres = handle >= kLeast && !IsOwn(lock, handle) && !IsParents(lock, handle);
  std::set<int32_t>& used = RunOf(lock, run).used;
  if (unused_.erase(handle) + dropped_.erase(handle) != 0 ||
      (is_elsewheres && adopted_.insert(handle).second)) {
    used.insert(handle);
    num_unused_ = static_cast<int64_t>(unused_.size());
    return Claim::kFirst;
  }
  return used.count(handle) != 0 ? Claim::kLater : Claim::kNone;
}

void Handles::UndoFirstUse(int32_t handle, int64_t run, const std::exception& error) {
  const Lock<Handles> lock(mutex_);
  if (RunOf(lock, run).used.erase(handle) == 0) return;  // another device was first, or release
  if (adopted_.erase(handle) == 0) unused_.emplace(handle, std::chrono::steady_clock::now());
  num_unused_ = static_cast<int64_t>(unused_.size());
  const auto* status = dynamic_cast<const StatusError*>(&error);
  const bool is_refused = status != nullptr && status->code() == StatusCode::kFailedPrecondition;
  const StatusCode code =
      is_refused ? StatusCode::kFailedPrecondition : StatusCode::kResourceExhausted;
  undone_.emplace(std::make_pair(handle, run), Undone{code, error.what()});
  const auto staged = staged_.find(handle);
  if (staged != staged_.end()) staged->second.num_filled = 0;
}

bool Handles::WasUndone(int32_t handle, int64_t run) const {
  const Lock<Handles> lock(mutex_);
  return undone_.count({handle, run}) != 0;
}

bool Handles::IsFromElsewhere(int32_t handle) const {
  const Lock<Handles> lock(mutex_);
  return !IsOwn(lock, handle) && !IsParents(lock, handle);
}

bool Handles::IsOwn(const Lock<Handles>&, int32_t handle) const {
  const auto contains = [&](const Range& range) { return range.Contains(handle); };
  return own_.Contains(handle) || std::any_of(shared_.begin(), shared_.end(), contains);
}

bool Handles::IsParents(const Lock<Handles>&, int32_t handle) const {
  const auto contains = [&](const Range& range) { return range.Contains(handle); };
  return std::any_of(parents_.begin(), parents_.end(), contains);
}

std::vector<int32_t> Handles::Unused() const {
  const Lock<Handles> lock(mutex_);
  std::vector<int32_t> handles;
  for (const auto& [handle, time] : unused_) handles.push_back(handle);
  handles.insert(handles.end(), dropped_.begin(), dropped_.end());
  return handles;
}

std::vector<std::pair<int32_t, double>> Handles::UnusedWithAges() const {
  const Lock<Handles> lock(mutex_);
  std::vector<std::pair<int32_t, double>> ages;
  const auto now = std::chrono::steady_clock::now();
  for (const auto& [handle, time] : unused_) {
    ages.emplace_back(handle, std::chrono::duration<double>(now - time).count());
  }
  return ages;
}

std::vector<int32_t> Handles::FirstUsedIn(int64_t run) const {
  const Lock<Handles> lock(mutex_);
  std::vector<int32_t> handles;
  const auto found = runs_.find(run);
  if (found != runs_.end()) handles.assign(found->second.used.begin(), found->second.used.end());
  for (const auto& [key, why] : undone_) {
    if (key.second == run) handles.push_back(key.first);
  }
  return handles;
}

std::shared_ptr<const Source> Handles::Drop(const Lock<Handles>&, int32_t handle) {
  unused_.erase(handle);
  dropped_.erase(handle);
  num_unused_ = static_cast<int64_t>(unused_.size());
  for (auto& [run, each] : runs_) each.used.erase(handle);
  undone_.erase(undone_.lower_bound({handle, std::numeric_limits<int64_t>::min()}),
                undone_.upper_bound({handle, std::numeric_limits<int64_t>::max()}));
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

void Handles::ForgetNow(int32_t handle) {
  std::shared_ptr<const Source> source;  // outlives the lock
  const Lock<Handles> lock(mutex_);
  if (unused_.count(handle) == 0) return;
  source = Drop(lock, handle);
  if (source == nullptr) dropped_.insert(handle);
}

void Handles::NoteMissed(int32_t handle) {
  const Lock<Handles> lock(mutex_);
  if (dropped_.erase(handle) == 0) return;
  unused_.emplace(handle, std::chrono::steady_clock::now());
  num_unused_ = static_cast<int64_t>(unused_.size());
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
    if (!is_unused) continue;
    gone.push_back(Drop(lock, each.handle));
    if (!has_source) dropped_.insert(each.handle);
  }
  forgotten_ = std::move(kept);
  any_forgotten_ = !forgotten_.empty();
  return gone;
}

Handles::Origin Handles::OriginOf(int32_t handle) const {
  const Lock<Handles> lock(mutex_);
  if (!IsOwn(lock, handle)) {
    if (IsParents(lock, handle)) return Origin::kParent;
    return adopted_.count(handle) ? Origin::kUsed : Origin::kElsewhere;
  }
  return unused_.count(handle)    ? Origin::kUnused
         : dropped_.count(handle) ? Origin::kDropped
                                  : Origin::kUsed;
}

}  // namespace paged_optax
