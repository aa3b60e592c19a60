// See cpu_device.h.
#include "state/cpu_device.h"

#include <algorithm>
#include <cstdlib>
#include <exception>
#include <utility>

#include "base/status.h"
#include "rules/rules.h"
#include "state/fill.h"
#include "state/fits.h"

namespace paged_optax {
namespace {

std::optional<LockedArena> LockArena(std::shared_ptr<Arena> arena, bool for_step = false) {
  if (arena == nullptr) return std::nullopt;
  ContentsLock lock(arena->mutex);
  arena->memory->CheckContents();
  if (for_step) arena->holds.AwaitNone(lock);
  const Header header = arena->header;
  return LockedArena{std::move(arena), header, std::move(lock)};
}

// The arena of a fresh state, or of one that was restored, whose steps count on from `version`.
std::shared_ptr<Arena> MakeOnHost(const Request& request, Token token, int32_t version) {
  if (request.source != nullptr) CheckFits(*request.source, request);
  const auto arena = MakeArena(request, token);
  PlaceOnHost(*arena);
  if (request.source != nullptr) {
    Fill(*request.source, request, *arena);
    arena->header.version = arena->restored_version = version;
    arena->awaits_end = true;
  }
  return arena;
}

bool IsWhole(Arena& arena) {
  try {
    arena.memory->CheckContents();
    return true;
  } catch (const StatusError&) {
    return false;
  }
}

// Whether the moments of a restored state, which a step wants to begin with, stay as they are. If
// not, a first step did not end, or their file was lost, and nothing here can be used from now on.
// They take part in this execution then.
bool Stay(Arena& arena, Token token, const Request& request, int32_t version) {
  const ContentsLock lock(arena.mutex);
  Header& header = arena.header;
  if (HasGoneOn(arena, header)) return true;  // and the step is refused
  const bool can_step = FindSlot(header, token.version) >= 0 && IsWhole(arena);
  if (!can_step) std::fill(std::begin(header.versions), std::end(header.versions), 0);
  header.version = arena.restored_version = std::max(header.version, version);
  arena.run = request.run;
  arena.awaits_end = true;
  return can_step;
}

}  // namespace

std::optional<LockedArena> CpuDevice::Open(Handles& handles, const Request& request, Token token) {
  const bool is_restored = request.source != nullptr;
  const int32_t version = is_restored ? handles.VersionToCountFrom(token.handle, request.run) : 0;
  std::shared_ptr<Arena> arena = FindOrMake(handles, request, token, version);
  const bool is_earlier = is_restored && arena != nullptr && arena->run != request.run;
  if (is_earlier && !Stay(*arena, token, request, version)) {
    arena = FindOrMake(handles, request, token, version, std::move(arena));
  }
  std::optional<LockedArena> locked = LockArena(std::move(arena), /*for_step=*/true);
  // A step that is one call ends if it begins. The request keeps what was staged.
  if (locked && locked->arena->signature.rule() != kArrayRule) {
    (void)EndFirstUse(handles, *locked->arena);
  }
  return locked;
}

std::shared_ptr<const Source> CpuDevice::EndFirstUse(Handles& handles, Arena& arena) {
  if (!std::exchange(arena.awaits_end, false)) return nullptr;
  return handles.NoteTaken(arena.header.handle, id(), arena.run, arena.signature.num_devices());
}

// The place of an arena that is being made, which is given up if that fails.
class CpuDevice::Making {
 public:
  Making(const ListLock&, CpuDevice& device, int32_t handle) : device_(device), handle_(handle) {
    device_.arenas_.emplace(handle, nullptr);
  }
  Making(const Making&) = delete;
  ~Making() {
    const ListLock lock(device_.mutex_);
    const auto found = device_.arenas_.find(handle_);
    if (arena == nullptr) {
      device_.arenas_.erase(found);
    } else {
      found->second = std::move(arena);
    }
    device_.made_.notify_all();
  }

  std::shared_ptr<Arena> arena = nullptr;

 private:
  CpuDevice& device_;
  const int32_t handle_;
};

std::shared_ptr<Arena> CpuDevice::FindOrMake(Handles& handles, const Request& request, Token token,
                                             int32_t version, std::shared_ptr<Arena> unusable) {
  ListLock lock(mutex_);
  std::shared_ptr<Arena> arena = FindMade(lock, token.handle);
  const bool is_restored = request.source != nullptr;
  if (arena != nullptr && arena == unusable) {
    handles.NoteUnended(token.handle, id(), request.run);
    arenas_.erase(token.handle);
    arena = nullptr;
  }
  const bool may_be_first = is_restored || MayStart(handles, request, token);
  if (arena != nullptr) {
    if (!may_be_first || !handles.WasUndone(token.handle, arena->run)) return arena;
    arenas_.erase(token.handle);  // Abandon has not come yet
  }
  if (!may_be_first) return nullptr;
  const Handles::Claim claim = handles.ClaimFirstUse(token.handle, request.run);
  if (claim == Handles::Claim::kNone) return nullptr;
  {
    Making making(lock, *this, token.handle);
    lock.unlock();
    unusable = nullptr;  // its memory goes first
    try {
      making.arena = arena = MakeOnHost(request, token, version);
    } catch (const std::exception& error) {
      handles.UndoFirstUse(token.handle, request.run, error);
      throw;
    }
  }
  if (!is_restored && claim == Handles::Claim::kFirst && token.version != 0) NoteRestart(*arena);
  return arena;
}

std::vector<std::shared_ptr<Arena>> CpuDevice::Arenas() {
  const ListLock lock(mutex_);
  std::vector<std::shared_ptr<Arena>> arenas;
  for (const auto& [handle, arena] : arenas_) {
    if (arena != nullptr) arenas.push_back(arena);
  }
  return arenas;
}

std::vector<int32_t> CpuDevice::States() {
  const ListLock lock(mutex_);
  std::vector<int32_t> handles;
  for (const auto& [handle, arena] : arenas_) handles.push_back(handle);
  return handles;
}

std::shared_ptr<Arena> CpuDevice::FindMade(ListLock& lock, int32_t handle) {
  std::map<int32_t, std::shared_ptr<Arena>>::iterator found;
  made_.wait(lock, [&] {
    found = arenas_.find(handle);
    return found == arenas_.end() || found->second != nullptr;
  });
  return found == arenas_.end() ? nullptr : found->second;
}

std::shared_ptr<Arena> CpuDevice::Find(int32_t handle) {
  ListLock lock(mutex_);
  return FindMade(lock, handle);
}

std::optional<LockedArena> CpuDevice::LockContents(int32_t handle) {
  return LockArena(Find(handle));
}

std::optional<LockedArena> CpuDevice::TakeContents(int32_t handle) {
  return LockArena(Find(handle), /*for_step=*/true);
}

std::optional<HeldArena> CpuDevice::HoldContents(int32_t handle) {
  std::optional<LockedArena> locked = LockContents(handle);
  if (!locked) return std::nullopt;
  Hold hold(locked->lock, locked->arena->holds);
  return HeldArena{locked->arena, locked->header, std::move(hold)};
}

std::optional<int64_t> CpuDevice::Limit(int32_t handle, int64_t device_bytes) {
  const auto locked = LockContents(handle);
  if (!locked) return std::nullopt;
  Memory& memory = *locked->arena->memory;
  const int64_t before = memory.ResidentBytes();
  if (device_bytes < 0) {
    memory.PageIn();
  } else {
    memory.PageOut(device_bytes);
  }
  return std::abs(memory.ResidentBytes() - before);
}

std::shared_ptr<Arena> CpuDevice::Remove(int32_t handle) {
  ListLock lock(mutex_);
  std::shared_ptr<Arena> arena = FindMade(lock, handle);
  if (arena != nullptr) arenas_.erase(handle);
  return arena;
}

void CpuDevice::Abandon(int32_t handle, int64_t run) {
  std::shared_ptr<Arena> arena;  // outlives the lock
  ListLock lock(mutex_);
  arena = FindMade(lock, handle);
  if (arena != nullptr && arena->run == run) arenas_.erase(handle);
}

}  // namespace paged_optax
