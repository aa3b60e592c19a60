// See cpu_device.h.
#include "state/cpu_device.h"

#include <cstdlib>

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

}  // namespace

std::optional<LockedArena> CpuDevice::Open(Handles& handles, const Request& request, Token token) {
  return LockArena(FindOrMake(handles, request, token), /*for_step=*/true);
}

std::shared_ptr<Arena> CpuDevice::FindOrMake(Handles& handles, const Request& request,
                                             Token token) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto found = arenas_.find(token.handle);
  if (found != arenas_.end()) return found->second;
  if (request.source != nullptr) return MakeFilled(handles, request, token);
  // Held until the arena is there: nobody else makes one for the same state meanwhile.
  const auto used = handles.Acquire();
  if (!StartsState(used, handles, request, token)) return nullptr;
  auto arena = MakeArena(request, token);
  PlaceOnHost(*arena);
  arenas_.emplace(token.handle, arena);
  if (handles.NoteUsed(used, token.handle, request.run) && token.version != 0) NoteRestart(*arena);
  return arena;
}

// Filling takes long, so handles are not locked meanwhile. Nobody else makes the arena: the caller
// has the list of arenas locked.
std::shared_ptr<Arena> CpuDevice::MakeFilled(Handles& handles, const Request& request,
                                             Token token) {
  if (!handles.IsFirstUse(handles.Acquire(), token.handle, request.run)) return nullptr;
  CheckFits(*request.source, request);
  auto arena = MakeArena(request, token);
  PlaceOnHost(*arena);
  Fill(*request.source, request, *arena);
  arenas_.emplace(token.handle, arena);
  const auto used = handles.Acquire();
  handles.NoteUsed(used, token.handle, request.run);
  handles.NoteFilled(used, token.handle, request.signature->num_devices());
  return arena;
}

std::vector<std::shared_ptr<Arena>> CpuDevice::Arenas() {
  std::lock_guard<std::mutex> lock(mutex_);
  std::vector<std::shared_ptr<Arena>> arenas;
  for (const auto& [handle, arena] : arenas_) arenas.push_back(arena);
  return arenas;
}

std::shared_ptr<Arena> CpuDevice::Find(int32_t handle) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto found = arenas_.find(handle);
  return found == arenas_.end() ? nullptr : found->second;
}

std::optional<LockedArena> CpuDevice::LockContents(int32_t handle) {
  return LockArena(Find(handle));
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
  std::lock_guard<std::mutex> lock(mutex_);
  const auto found = arenas_.find(handle);
  if (found == arenas_.end()) return nullptr;
  const std::shared_ptr<Arena> arena = std::move(found->second);
  arenas_.erase(found);
  return arena;
}

}  // namespace paged_optax
