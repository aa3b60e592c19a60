// A device of this process and the arenas on it: what the registry asks of both kinds of device.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "layout/token.h"
#include "state/arena.h"
#include "state/device_id.h"
#include "state/hold.h"

namespace paged_optax {

class Device {
 public:
  Device(DeviceId id, Holds& holds) : id_(id), holds_(holds) {}
  Device(const Device&) = delete;
  virtual ~Device() = default;

  DeviceId id() const { return id_; }

  virtual std::vector<std::shared_ptr<Arena>> Arenas() = 0;
  // The handles of these, and of those that are being made.
  virtual std::vector<int32_t> States() = 0;
  // The arena of a state, if it is made. Like Arenas, this never waits for a step of any device:
  // steps ask it, and one that waits for another device's may wait for itself.
  virtual std::shared_ptr<Arena> Look(int32_t handle) = 0;

  // The seven that follow return nothing if the state has no arena here, and wait for one that is
  // being made.
  virtual std::shared_ptr<Arena> Find(int32_t handle) = 0;
  // Keeps steps from starting and waits for those under way.
  virtual std::optional<LockedArena> LockContents(int32_t handle) = 0;
  // The same, on a CPU also where contents were lost.
  virtual std::optional<LockedArena> LockAnyway(int32_t handle) { return LockContents(handle); }
  // As LockContents, and waits for a move under way.
  virtual std::optional<LockedArena> SettleContents(int32_t handle) { return LockContents(handle); }
  // To change the contents by hand: nobody holds them, and nothing moves.
  virtual std::optional<LockedArena> TakeContents(int32_t handle) = 0;
  // Limits the moments to so many bytes of the device's memory (negative: no limit), moves what has
  // to move, and returns the bytes that moved.
  virtual std::optional<int64_t> Limit(int32_t handle, int64_t device_bytes) = 0;
  // Takes the arena off the device. Its memory goes with the last pointer to it.
  virtual std::shared_ptr<Arena> Remove(int32_t handle) = 0;
  // Takes it off if it was made in this execution, in which another device failed to make its own.
  virtual void Abandon(int32_t handle, int64_t run) = 0;

  // Writes the version of `header` and those of its slots, with the contents locked.
  virtual void SetVersions(const LockedArena& locked, const Header& header) = 0;

  // What a GPU found out and nobody has taken yet: that it refused a step, and that a step ended a
  // life. The handler of a CPU knows at once, and reports nothing here. HasReports takes no lock.
  virtual bool HasReports() const { return false; }
  virtual std::optional<Rejection> TakeRejection() { return std::nullopt; }
  virtual std::optional<Restart> TakeRestart() { return std::nullopt; }
  // Ends the thread that moves moments, for the end of the process.
  virtual void StopMoving() {}

 protected:
  Holds& holds() const { return holds_; }

 private:
  const DeviceId id_;
  Holds& holds_;
};

}  // namespace paged_optax
