// The arenas of one of XLA's CPU devices.
#pragma once

#include <algorithm>
#include <condition_variable>
#include <map>
#include <mutex>

#include "state/device.h"
#include "state/handles.h"

namespace paged_optax {

class CpuDevice final : public Device {
 public:
  static constexpr Platform kPlatform = Platform::kCpu;
  CpuDevice(int ordinal, Holds& holds) : Device({kPlatform, ordinal}, holds) {}

  // The arena of a token, made at the first use of its state; nothing if that was elsewhere.
  std::optional<LockedArena> Open(Handles& handles, const Request& request, Token token);

  std::vector<std::shared_ptr<Arena>> Arenas() override;
  std::vector<int32_t> States() override;
  std::shared_ptr<Arena> Look(int32_t handle) override { return Find(handle); }
  std::shared_ptr<Arena> Find(int32_t handle) override;
  std::optional<LockedArena> LockContents(int32_t handle) override;
  std::optional<LockedArena> LockAnyway(int32_t handle) override;
  std::optional<LockedArena> TakeContents(int32_t handle) override;
  void SetVersions(const LockedArena& locked, const Header& header) override {
    // The rest of a header never changes, and others read it without the lock.
    locked.arena->header.version = header.version;
    std::copy_n(header.versions, kMaxSlots, locked.arena->header.versions);
  }
  std::optional<int64_t> Limit(int32_t handle, int64_t device_bytes) override;
  std::shared_ptr<Arena> Remove(int32_t handle) override;
  void Abandon(int32_t handle, int64_t run) override;

 private:
  using ListLock = std::unique_lock<std::mutex>;
  class Making;

  std::shared_ptr<Arena> FindOrMake(Handles& handles, const Request& request, Token token);
  std::shared_ptr<Arena> FindMade(ListLock& lock, int32_t handle);
  std::optional<LockedArena> LockToChange(std::shared_ptr<Arena> arena);

  // By handle. Null while one is being made, which may take seconds and is done without the lock:
  // only who asks for this very state waits.
  std::map<int32_t, std::shared_ptr<Arena>> arenas_;
  std::mutex mutex_;  // guards them
  std::condition_variable made_;
};

}  // namespace paged_optax
