// Who owns the moments: finds those of a token on all devices, and says why a token was refused.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

#include "state/arena.h"
#include "state/contents.h"
#include "state/copies.h"
#include "state/device.h"
#include "state/handles.h"
#include "state/hold.h"
#include "state/refusals.h"
#include "state/snapshot.h"

namespace paged_optax {

// Process-wide, thread-safe, never destroyed: nothing calls CUDA while the process exits. A forked
// process starts with an empty one: it has none of the threads that may hold a lock of its
// parent's, and none of the memory.
class Registry {
 public:
  static Registry& Get();

  Handles& handles() { return handles_; }
  Copies& copies() { return copies_; }

  // The CpuDevice or CudaDevice with this number.
  template <class D>
  D& At(int ordinal) {
    std::lock_guard<std::mutex> lock(mutex_);
    const DeviceId id{D::kPlatform, ordinal};
    auto found = devices_.find(id);
    // If that fails, there is no such device, and the next call tries again.
    if (found == devices_.end())
      found = devices_.emplace(id, std::make_unique<D>(ordinal, holds_)).first;
    return static_cast<D&>(*found->second);
  }

  // The arena for a token on the CPU, made at its first use. Throws what Explain says.
  LockedArena Open(const Request& request, Token token);

  // Why a token was refused, for the user, and the same thrown. No contents may be locked.
  std::string Explain(DeviceId device, const Rejection& rejection);
  [[noreturn]] void Refuse(DeviceId device, const Rejection& rejection);
  // Keeps the signature of a call, for Explain.
  void Remember(const Signature& signature, uint64_t fingerprint);

  // Keeps what a step was refused for, and warns the user. No contents may be locked.
  void NoteRefused(Token token, const std::string& reason);
  // Warns, once a state, that a step from its initial state ended a life of so many steps.
  void NoteRestarted(Restart restart);
  // Takes over what GPUs have found out meanwhile. Waits for no step. No contents may be locked.
  void CollectReports();
  // Whether a step was refused that nobody has been told of. Takes no lock that is held for long.
  bool AnyRefused();
  // The user is about to mend it.
  void ForgetRefused(int32_t handle);
  // Throws for such a step, of this state or of any. Nobody is told twice.
  void ThrowIfRefused(std::optional<int32_t> handle = std::nullopt);

  // All arenas of a state; waits for the device. Throws if there is none although the state was
  // used.
  std::vector<ArenaReport> Describe(Token token);

  // The contents that a token stands for, to be read for as long as the result lives: no step
  // starts meanwhile. Throws what Explain says.
  struct OpenSlot {
    LockedArena locked;
    int32_t slot;
  };
  OpenSlot Read(DeviceId device, Token token);
  // The same of several at once, for longer, and without locks that a thread would have to give up
  // itself: for as long as one of the results lives, no step of any of these states starts.
  struct Wanted {
    DeviceId device;
    Token token;
  };
  std::vector<Snapshot> HoldAll(const std::vector<Wanted>& wanted);

  // The newest contents that all devices have: their version, 0 for a fresh state, and the count of
  // a state with them, kNoCount if it is not known; the first version of their life, 0 before the
  // first step; and the version for which moments are zero, see Header. Nothing if there is neither
  // an arena nor an unused handle. Waits for the device.
  struct Newest {
    int32_t version;
    int32_t count;
    int32_t started;
    int32_t first;
  };
  std::optional<Newest> FindNewest(int32_t handle);

  // All arenas, by device; waits for the devices.
  std::vector<ArenaReport> DescribeAll();

  // The newest version of a state's moments: 0 if it is fresh, 1 if it was restored and not used.
  // Nothing if it was released or is not of this process. Waits for the device.
  std::optional<int32_t> NewestVersion(int32_t handle);
  // Whether NewestVersion would say something. Waits for no step, but for an arena that is being
  // made.
  bool IsAlive(int32_t handle);

  // Stores other codes and words of some leaves in the place of the newest contents, once no step,
  // no move and no snapshot is under way, under a new version, which it returns.
  int32_t Rewrite(DeviceId device, Token token, const std::vector<LeafRewrite>& leaves);

  // Limits the moments of a state to so many bytes of each device's memory (negative: no limit) and
  // moves what has to move. Returns the bytes that were moved.
  int64_t Limit(Token token, int64_t device_bytes);

  // Frees every arena of a state, waiting for steps under way. Returns the bytes freed.
  int64_t Release(int32_t handle);
  int64_t ReleaseAll();

  // Ends the threads that move moments, for the end of the process.
  void StopPagers();

  int64_t NumArenas();

 private:
  explicit Registry(const Registry* parent);
  std::vector<Device*> Devices();
  Device* FindDevice(DeviceId id);
  // Locks contents in one of the ways that a Device has for it.
  using LockContents = std::optional<LockedArena> (Device::*)(int32_t);
  OpenSlot FindContents(const Wanted& wanted, LockContents lock);
  // What the devices have of a state, if possible at a time when none began a step. Waits for them.
  std::vector<Header> ReadHeaders(int32_t handle);

  Handles handles_;
  Holds holds_;
  Copies copies_;
  std::mutex mutex_;
  std::mutex rewriting_;                                 // taken before all others
  std::map<DeviceId, std::unique_ptr<Device>> devices_;  // never removed
  std::set<int32_t> restarted_;                          // handles that NoteRestarted knows
  Refusals refusals_;
  std::unordered_map<uint64_t, Signature> signatures_;  // never removed
};

}  // namespace paged_optax
