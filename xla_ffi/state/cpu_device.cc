// See cpu_device.h.
#include "state/cpu_device.h"

#include <cstdlib>

namespace paged_optax {
namespace {

std::optional<LockedArena> LockArena(std::shared_ptr<Arena> arena) {
  if (arena == nullptr) return std::nullopt;
  ContentsLock lock(arena->mutex);
  arena->memory->CheckContents();
  const Header header = arena->header;
  return LockedArena{std::move(arena), header, std::move(lock)};
}

}  // namespace

std::optional<LockedArena> CpuDevice::Open(Handles& handles, const Request& request, Token token) {
  return LockArena(FindOrMake(handles, request, token));
}

std::shared_ptr<Arena> CpuDevice::FindOrMake(Handles& handles, const Request& request,
                                             Token token) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto found = arenas_.find(token.handle);
  if (found != arenas_.end()) return found->second;
  if (token.version != 0) return nullptr;
  // Held until the arena is there: nobody else makes one for the same state meanwhile.
  const auto used = handles.Acquire();
  if (!handles.IsFirstUse(used, token.handle, request.run)) return nullptr;
  auto arena = MakeArena(request, token);
  PlaceOnHost(*arena);
  arenas_.emplace(token.handle, arena);
  handles.NoteUsed(used, token.handle, request.run);
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
