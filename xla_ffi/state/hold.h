// Keeps contents as they are for longer than a lock may be held: a reader may give threads back to
// Python meanwhile, and end in another thread than it began.
//
// A Hold takes two steps. From its announcement on, whatever changes contents says so just before,
// and no move starts; steps are not stopped yet. Then it begins, at once for all contents or not at
// all: only if none of them was about to change since before its owner began to wait for them. So
// whoever has a Hold that has begun waits for no device and for no lock of contents. Otherwise a
// GPU whose step waits for the Hold could keep another GPU, which has a collective with it, from
// ever being done. A question about several devices announces a Hold, and never begins it.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "state/device_id.h"
#include "state/lock.h"

namespace paged_optax {

// Which contents of this process are held, or are about to be.
class Holds {
 public:
  using Place = std::pair<DeviceId, int32_t>;  // a device, and the handle of a state

  Holds() = default;
  Holds(const Holds&) = delete;

  // Whether there is a Hold, announced at least, of anything on this device.
  bool any(DeviceId device) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return HasAny(device);
  }

  // Waits, without that lock, until there is none.
  void AwaitNone(ContentsLock& contents, DeviceId device) {
    const ContentsLock::Pause pause(contents);
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return !HasAny(device); });
  }

  // To be called right before contents change, under the lock of contents that they change under.
  // Waits until nobody holds them, without that lock; returns whether it had to.
  bool BeforeChange(ContentsLock& contents, const Place& place) {
    for (bool waited = false;; waited = true) {
      {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (!IsHeld(place)) {
          const auto found = entries_.find(place);
          if (found != entries_.end()) ++found->second.changes;
          return waited;
        }
      }
      const ContentsLock::Pause pause(contents);
      std::unique_lock<std::mutex> lock(mutex_);
      changed_.wait(lock, [&] { return !IsHeld(place); });
    }
  }

 private:
  friend class Hold;
  struct Entry {
    int announced = 0;  // Holds, of which so many
    int begun = 0;      // have begun
    int64_t changes = 0;
  };

  bool HasAny(DeviceId device) const {
    const auto found = entries_.lower_bound({device, std::numeric_limits<int32_t>::min()});
    return found != entries_.end() && found->first.first == device;
  }
  bool IsHeld(const Place& place) const {
    const auto found = entries_.find(place);
    return found != entries_.end() && found->second.begun > 0;
  }

  mutable std::mutex mutex_;
  std::map<Place, Entry> entries_;
  std::condition_variable changed_;
};

class [[nodiscard]] Hold {
 public:
  // Announces it, or throws and leaves nothing behind.
  Hold(Holds& holds, std::vector<Holds::Place> places) : holds_(holds), places_(std::move(places)) {
    std::map<Holds::Place, Holds::Entry> entries;  // made beforehand: memory may be short
    for (const Holds::Place& place : places_) entries[place];
    const std::lock_guard<std::mutex> lock(holds_.mutex_);
    holds_.entries_.merge(entries);
    for (const Holds::Place& place : places_) ++holds_.entries_.find(place)->second.announced;
  }
  Hold(const Hold&) = delete;
  // Waits for nothing.
  ~Hold() {
    const std::lock_guard<std::mutex> lock(holds_.mutex_);
    for (const Holds::Place& place : places_) {
      const auto found = holds_.entries_.find(place);
      if (has_begun_) --found->second.begun;
      if (--found->second.announced == 0) holds_.entries_.erase(found);
    }
    holds_.changed_.notify_all();
  }

  // How often the contents were about to change. To be asked before waiting for what is under way.
  int64_t changes() const {
    const std::lock_guard<std::mutex> lock(holds_.mutex_);
    return Sum();
  }
  // Begins, unless the contents were about to change since `changes` was asked. Returns whether it
  // did. Once.
  bool Begin(int64_t changes) {
    const std::lock_guard<std::mutex> lock(holds_.mutex_);
    if (Sum() != changes) return false;
    for (const Holds::Place& place : places_) ++holds_.entries_.find(place)->second.begun;
    return has_begun_ = true;
  }

  // Keeps something alive until others need not wait any more: an arena that goes waits for its
  // device.
  void Keep(std::shared_ptr<const void> owned) { owned_.push_back(std::move(owned)); }

 private:
  int64_t Sum() const {
    int64_t sum = 0;
    for (const Holds::Place& place : places_) sum += holds_.entries_.find(place)->second.changes;
    return sum;
  }

  Holds& holds_;
  const std::vector<Holds::Place> places_;
  bool has_begun_ = false;
  std::vector<std::shared_ptr<const void>> owned_;
};

}  // namespace paged_optax
