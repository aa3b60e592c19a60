// Keeps contents as they are for longer than a lock may be held: a reader may give threads back to
// Python meanwhile, and end in another thread than it began.
#pragma once

#include <condition_variable>
#include <utility>

#include "state/lock.h"

namespace paged_optax {

// How many hold the contents that a mutex guards. Steps wait until nobody does.
class Holds {
 public:
  explicit Holds(ContentsMutex& mutex) : mutex_(mutex) {}
  Holds(const Holds&) = delete;

  bool any(const ContentsLock&) const { return count_ > 0; }
  // Gives the lock up while it waits.
  void AwaitNone(ContentsLock& lock) {
    lock.Await(changed_, [&] { return count_ == 0; });
  }

 private:
  friend class Hold;
  ContentsMutex& mutex_;
  int count_ = 0;
  std::condition_variable changed_;
};

class [[nodiscard]] Hold {
 public:
  Hold(const ContentsLock&, Holds& holds) : holds_(&holds) { ++holds.count_; }
  Hold(Hold&& other) noexcept : holds_(std::exchange(other.holds_, nullptr)) {}
  Hold& operator=(Hold&&) = delete;
  ~Hold() {
    if (holds_ == nullptr) return;
    const ContentsLock lock(holds_->mutex_);
    if (--holds_->count_ == 0) holds_->changed_.notify_all();
  }

 private:
  Holds* holds_;
};

}  // namespace paged_optax
