// See cpu_device.h.
#include "state/cpu_device.h"

#include <cstdlib>
#include <exception>
#include <utility>

#include "state/fill.h"
#include "state/fits.h"

namespace paged_optax {
namespace {

std::optional<LockedArena> LockArena(std::shared_ptr<Arena> arena, bool is_checked = true) {
  if (arena == nullptr) return std::nullopt;
  ContentsLock lock(arena->mutex);
  if (is_checked) arena->memory->CheckContents();
  const Header header = arena->header;
  return LockedArena{std::move(arena), header, std::move(lock)};
}

// The arena of a fresh state, or of one that was restored.
std::shared_ptr<Arena> MakeOnHost(const Request& request, Token token) {
  if (request.source != nullptr) CheckFits(*request.source, request);
  const auto arena = MakeArena(request, token);
  PlaceOnHost(*arena);
  if (request.source != nullptr) Fill(*request.source, request, *arena);
  return arena;
}

}  // namespace

std::optional<LockedArena> CpuDevice::Open(Handles& handles, const Request& request, Token token) {
  return LockToChange(FindOrMake(handles, request, token));
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

std::shared_ptr<Arena> CpuDevice::FindOrMake(Handles& handles, const Request& request,
                                             Token token) {
  ListLock lock(mutex_);
  std::shared_ptr<Arena> arena = FindMade(lock, token.handle);
  const bool is_restored = request.source != nullptr;
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
    try {
      making.arena = arena = MakeOnHost(request, token);
    } catch (const std::exception& error) {
      handles.UndoFirstUse(token.handle, request.run, error);
      throw;
    }
  }
  if (is_restored) {
    handles.NoteFilled(token.handle, request.run, request.signature->num_devices());
  } else if (claim == Handles::Claim::kFirst && token.version != 0) {
    NoteRestart(*arena);
  }
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

std::optional<LockedArena> CpuDevice::LockAnyway(int32_t handle) {
  return LockArena(Find(handle), /*is_checked=*/false);
}

std::optional<LockedArena> CpuDevice::TakeContents(int32_t handle) {
  return LockToChange(Find(handle));
}

std::optional<LockedArena> CpuDevice::LockToChange(std::shared_ptr<Arena> arena) {
  std::optional<LockedArena> locked = LockArena(std::move(arena));
  if (locked && holds().BeforeChange(locked->lock, {id(), locked->header.handle})) {
    locked->arena->memory->CheckContents();
    locked->header = locked->arena->header;  // of now
  }
  return locked;
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
