// Possession of a mutex, as a type: a function that may be called only while a mutex is held takes
// its Lock as an argument.
//
// The order of all locks, where one is taken while another is held:
//   1. Lock<Contents>: what is in an arena. Every CPU arena has its own; a GPU has one for all of
//      its arenas and for its pager. A thread never holds two.
//   2. the list of a CPU device's arenas. It is never taken together with a Lock<Contents>.
//      Nor is it held, or a Lock<Contents> of a GPU, while an arena is being made.
//   3. Lock<Handles>: which handles are out, and which of them were used.
// A thread may wait for a GPU while it has the Lock<Contents> of that GPU. What is queued there may
// wait, in a collective, for a launch on another GPU. So a step never takes the Lock<Contents> of
// another device, also not to tell of a step that was refused.
// A Hold (state/hold.h) is no lock: it makes steps wait for as long as it lives. Who has begun one
// waits for no Lock<Contents> and for no device until it ends.
// Every other mutex is private to one class, which calls nothing that locks while it holds it.
#pragma once

#include <condition_variable>
#include <mutex>

namespace paged_optax {

template <class Guarded>
class Lock;

// `Guarded` only names what is guarded.
template <class Guarded>
class Mutex {
  friend class Lock<Guarded>;
  std::mutex mutex_;
};

template <class Guarded>
class [[nodiscard]] Lock {
 public:
  explicit Lock(Mutex<Guarded>& mutex) : lock_(mutex.mutex_) {}

  // Both give the mutex up while they wait.
  void Await(std::condition_variable& changed) { changed.wait(lock_); }
  template <class Condition>
  void Await(std::condition_variable& changed, const Condition& condition) {
    changed.wait(lock_, condition);
  }

  // Gives the mutex up for as long as it lives.
  class Pause {
   public:
    explicit Pause(Lock& lock) : lock_(lock.lock_) { lock_.unlock(); }
    Pause(const Pause&) = delete;
    ~Pause() { lock_.lock(); }

   private:
    std::unique_lock<std::mutex>& lock_;
  };

 private:
  std::unique_lock<std::mutex> lock_;
};

struct Contents;
using ContentsMutex = Mutex<Contents>;
using ContentsLock = Lock<Contents>;

}  // namespace paged_optax
