// Which handles this process has given to states, and which of them have been used.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <deque>
#include <exception>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "base/status.h"
#include "state/device_id.h"
#include "state/lock.h"

namespace paged_optax {

struct Source;

// Where a call stands in a program. The seed differs between two calls that were traced. Calls that
// come from one trace (of a cached function) have the same seed, and XLA may run them in another
// order on each device; what differs is the place where XLA keeps their attributes, which all
// devices share.
struct CallSite {
  int32_t seed;
  const void* place = nullptr;
  bool operator<(const CallSite& other) const {
    return std::tie(seed, place) < std::tie(other.seed, other.place);
  }
};

class Handles {
 public:
  // `parent`: those of the process that this one was forked from, if it was. They are only read,
  // and need no lock: nobody changes them in this process.
  explicit Handles(const Handles* parent = nullptr);

  // Handle of a new state. Devices that take part in one execution get the same handle.
  // Within one, calls are told apart by where they stand in the program, and in a loop by their
  // order. `shared`: other processes take part as well, and all of them count from the shared base.
  int32_t Issue(DeviceId device, int64_t run, CallSite site, bool shared);
  // Handle of a state that was restored, whose moments come from `source` at its first use, and
  // have version 1.
  int32_t Stage(std::shared_ptr<const Source> source, bool shared);
  // What was staged for a handle; null if nothing was, or if all devices have taken it over.
  std::shared_ptr<const Source> SourceOf(int32_t handle) const;
  // One of so many devices took over what was staged, in this execution.
  void NoteFilled(int32_t handle, int64_t run, int64_t num_devices);
  int64_t NumFilled(int32_t handle) const;

  // A random number that the processes of this job have in common. A job that follows in the same
  // process has another.
  void SetSharedBase(int32_t random);

  // A state is used for the first time if it never was, or if another device was first in this same
  // execution; states of other processes are used here for the first time too. If so, the caller
  // makes an arena for it, and nobody does in another execution. If that fails, no device may keep
  // what it made in this execution: the state is as it was, and can be used for the first time in
  // another one. ClaimFirstUse throws on the devices that come later: a refusal if the error was
  // one, so that all of them refuse the step.
  enum class Claim { kNone, kFirst, kLater };  // kLater: another device was first
  Claim ClaimFirstUse(int32_t handle, int64_t run);
  void UndoFirstUse(int32_t handle, int64_t run, const std::exception& error);
  bool WasUndone(int32_t handle, int64_t run) const;
  // Another process issued the handle, and no parent of this one did.
  bool IsFromElsewhere(int32_t handle) const;

  // States that were made and never used. Takes no lock.
  int64_t num_unused() const { return num_unused_; }
  std::vector<int32_t> Unused() const;  // those that were forgotten too
  // With the seconds since they were issued.
  std::vector<std::pair<int32_t, double>> UnusedWithAges() const;
  // Of recent executions: the handles that were used for the first time in this one, or were to be.
  std::vector<int32_t> FirstUsedIn(int64_t run) const;

  // The state was released.
  void Release(int32_t handle);

  // Nobody has the token of a state that was never used. The update that takes it may be queued,
  // so for a while the handle can still be used: until kGrace has passed and handlers were called
  // kGraceCalls times, or until many more were forgotten. Returns whether there is such a state.
  //
  // The handle still works if its token turns up after all, except that a GPU refuses the first
  // step: it has not looked at the token. What was staged is gone.
  bool Forget(int32_t handle);
  // The same at once, for a token that was never handed to anything.
  void ForgetNow(int32_t handle);
  // A GPU refused a step of this handle because it has no arena. From now on GPUs look at tokens
  // again if the handle was forgotten.
  void NoteMissed(int32_t handle);
  // A handler was called.
  void NoteCall();

  // Another process issued the handle; or one did that this one was forked from; or this one did,
  // and its state was not used, or was forgotten before it was, or was used.
  enum class Origin { kElsewhere, kParent, kUnused, kDropped, kUsed };
  Origin OriginOf(int32_t handle) const;
  // Whether this process issued the handle, and its state was not used yet.
  bool MayBeUsed(int32_t handle) const {
    const Origin origin = OriginOf(handle);
    return origin == Origin::kUnused || origin == Origin::kDropped;
  }

 private:
  using Time = std::chrono::steady_clock::time_point;
  // The handles that one place in a program got in one execution, and how many of them each device
  // has had.
  struct Issued {
    std::vector<int32_t> handles;
    std::map<DeviceId, size_t> next;
  };
  struct Run {
    std::map<CallSite, Issued> issued;
    std::set<int32_t> used;  // for the first time
  };
  struct Undone {
    StatusCode code;
    std::string why;
  };
  struct Staged {
    std::shared_ptr<const Source> source;
    int64_t num_filled = 0;
  };
  struct Forgotten {
    int32_t handle;
    Time time;
    int64_t call;  // number of the next one
  };
  using Sources = std::vector<std::shared_ptr<const Source>>;

  Run& RunOf(const Lock<Handles>&, int64_t run);
  int32_t IssueNext(const Lock<Handles>&, bool shared);
  bool IsOwn(const Lock<Handles>&, int32_t handle) const;
  bool IsParents(const Lock<Handles>&, int32_t handle) const;
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
  std::vector<Range> shared_;  // one for each job, the last one counts
  std::vector<Range> parents_;
  std::map<int64_t, Run> runs_;                           // recent
  std::deque<int64_t> order_;                             // of the runs, oldest first
  int64_t num_issued_ = 0;                                // in recent runs
  std::map<std::pair<int32_t, int64_t>, Undone> undone_;  // by handle and run
  std::map<int32_t, Time> unused_;                        // issued when; no arena on any device yet
  std::set<int32_t> dropped_;                             // the same, and forgotten
  std::set<int32_t> adopted_;  // from elsewhere, with an arena here at some time
  std::atomic<int64_t> num_unused_{0};
  std::map<int32_t, Staged> staged_;
  std::deque<Forgotten> forgotten_;  // oldest first
  std::atomic<bool> any_forgotten_{false};
  std::atomic<int64_t> num_calls_{0};
};

}  // namespace paged_optax
