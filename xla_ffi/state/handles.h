// Which handles this process has given to states, and which of them have been used.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <set>
#include <vector>

#include "state/device_id.h"
#include "state/lock.h"

namespace paged_optax {

struct Source;

class Handles {
 public:
  // `parent`: those of the process that this one was forked from, if it was. They are only read,
  // and need no lock: nobody changes them in this process.
  explicit Handles(const Handles* parent = nullptr);

  // Handle of a new state. Devices that take part in one execution get the same handle.
  // Within one, calls are told apart by `seed` and, for the same seed (a loop), by their order.
  // `shared`: other processes take part as well, and all of them count from the shared base.
  int32_t Issue(DeviceId device, int64_t run, int32_t seed, bool shared);
  // Handle of a state that was restored, whose moments come from `source` at its first use, and
  // have version 1.
  int32_t Stage(std::shared_ptr<const Source> source, bool shared);
  // What was staged for a handle; null if nothing was, or if all devices have taken it over.
  std::shared_ptr<const Source> SourceOf(int32_t handle) const;
  // One of so many devices took over what was staged.
  void NoteFilled(const Lock<Handles>&, int32_t handle, int64_t num_devices);
  int64_t NumFilled(int32_t handle) const;

  // A random number that the processes of this job have in common; later calls change nothing.
  void SetSharedBase(int32_t random);

  // A state is used for the first time if it never was, or if another device was first in this same
  // execution. The caller makes an arena for it and then calls NoteUsed, which says whether it was
  // the first device. States of other processes are used here for the first time too.
  Lock<Handles> Acquire() { return Lock<Handles>(mutex_); }
  bool IsFirstUse(const Lock<Handles>&, int32_t handle, int64_t run) const;
  bool NoteUsed(const Lock<Handles>&, int32_t handle, int64_t run);
  // Another process issued the handle, and no parent of this one did.
  bool IsFromElsewhere(const Lock<Handles>&, int32_t handle) const;

  // States that were made and never used. Takes no lock.
  int64_t num_unused() const { return num_unused_; }
  std::vector<int32_t> Unused() const;
  // Of recent executions: the handles that were used for the first time in this one.
  std::vector<int32_t> FirstUsedIn(int64_t run) const;

  // The state was released.
  void Release(int32_t handle);

  // Nobody has the token of a state that was never used. The update that takes it may be queued,
  // so for a while the handle can still be used: until kGrace has passed and handlers were called
  // kGraceCalls times, or until many more were forgotten. Returns whether there is such a state.
  bool Forget(int32_t handle);
  // A handler was called.
  void NoteCall();

  // Another process issued the handle; or one did that this one was forked from; or this one did,
  // and its state was or was not used.
  enum class Origin { kElsewhere, kParent, kUnused, kUsed };
  Origin OriginOf(int32_t handle) const;

 private:
  struct Issued {
    int64_t run;
    int32_t seed;
    int32_t handle;
    std::set<DeviceId> devices;
  };
  struct Used {
    int32_t handle;
    int64_t run;
  };
  struct Staged {
    std::shared_ptr<const Source> source;
    int64_t num_filled = 0;
  };
  struct Forgotten {
    int32_t handle;
    std::chrono::steady_clock::time_point time;
    int64_t call;  // number of the next one
  };
  using Sources = std::vector<std::shared_ptr<const Source>>;

  int32_t IssueNext(const Lock<Handles>&, bool shared);
  // Ends the states whose time is over. Their sources may only go without the lock.
  Sources Sweep(const Lock<Handles>&);
  std::shared_ptr<const Source> Drop(const Lock<Handles>&, int32_t handle);

  struct Range {
    int32_t first;
    int32_t next;
    bool Contains(int32_t handle) const { return first <= handle && handle < next; }
  };

  mutable Mutex<Handles> mutex_;
  Range own_;
  Range shared_{0, 0};  // {0, 0}: not set
  std::vector<Range> parents_;
  std::deque<Issued> issued_;  // recent
  std::deque<Used> used_;      // recent
  std::set<int32_t> unused_;   // issued, no arena on any device yet
  std::set<int32_t> adopted_;  // from elsewhere, with an arena here at some time
  std::atomic<int64_t> num_unused_{0};
  std::map<int32_t, Staged> staged_;
  std::deque<Forgotten> forgotten_;  // oldest first
  std::atomic<bool> any_forgotten_{false};
  std::atomic<int64_t> num_calls_{0};
};

}  // namespace paged_optax
