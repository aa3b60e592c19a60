// The arenas of one of XLA's CPU devices.
#pragma once

#include <condition_variable>
#include <map>
#include <mutex>

#include "state/device.h"
#include "state/handles.h"

namespace paged_optax {

class CpuDevice final : public Device {
 public:
  static constexpr Platform kPlatform = Platform::kCpu;
  explicit CpuDevice(int ordinal) : Device({kPlatform, ordinal}) {}

  // The arena of a token, made at the first use of its state; nothing if that was elsewhere.
  // Moments that were restored and are lost before a step of them has ended are made once more.
  std::optional<LockedArena> Open(Handles& handles, const Request& request, Token token);
  // To be called when a step ends, with the contents locked. Returns what the state was restored
  // from if nobody needs it any more, for the caller to let go of it when it holds no lock.
  [[nodiscard]] std::shared_ptr<const Source> EndFirstUse(Handles& handles, Arena& arena);

  std::vector<std::shared_ptr<Arena>> Arenas() override;
  std::vector<int32_t> States() override;
  std::shared_ptr<Arena> Find(int32_t handle) override;
  std::optional<LockedArena> LockContents(int32_t handle) override;
  std::optional<HeldArena> HoldContents(int32_t handle) override;
  std::optional<LockedArena> TakeContents(int32_t handle) override;
  void SetHeader(const LockedArena& locked, const Header& header) override {
    locked.arena->header = header;
  }
  std::optional<int64_t> Limit(int32_t handle, int64_t device_bytes) override;
  std::shared_ptr<Arena> Remove(int32_t handle) override;
  void Abandon(int32_t handle, int64_t run) override;

 private:
  using ListLock = std::unique_lock<std::mutex>;
  class Making;

  // `version`: from which a restored state counts on. `unusable`: what was found and cannot be
  // used, if anything; its place is taken.
  std::shared_ptr<Arena> FindOrMake(Handles& handles, const Request& request, Token token,
                                    int32_t version, std::shared_ptr<Arena> unusable = nullptr);
  std::shared_ptr<Arena> FindMade(ListLock& lock, int32_t handle);

  // By handle. Null while one is being made, which may take seconds and is done without the lock:
  // only who asks for this very state waits.
  std::map<int32_t, std::shared_ptr<Arena>> arenas_;
  std::mutex mutex_;  // guards them
  std::condition_variable made_;
};

}  // namespace paged_optax
