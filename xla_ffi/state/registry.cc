// See registry.h.
#include "state/registry.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <set>

#include "base/status.h"
#include "state/cpu_device.h"
#include "state/explain.h"

namespace paged_optax {

namespace {

std::atomic<Registry*> current{nullptr};
std::atomic<Registry*> parents{nullptr};  // of the process that this one was forked from

// In a forked process, before anything else runs.
void ForgetParent() {
  if (Registry* registry = current.exchange(nullptr)) parents = registry;
}

}  // namespace

Registry& Registry::Get() {
  if (Registry* registry = current) return *registry;
  [[maybe_unused]] static const int is_watching = pthread_atfork(nullptr, nullptr, &ForgetParent);
  Registry* made = new Registry(parents);
  Registry* other = nullptr;
  if (current.compare_exchange_strong(other, made)) return *made;
  delete made;
  return *other;
}

Registry::Registry(const Registry* parent) : handles_(parent ? &parent->handles_ : nullptr) {}

std::vector<Device*> Registry::Devices() {
  std::lock_guard<std::mutex> lock(mutex_);
  std::vector<Device*> devices;
  for (const auto& [id, device] : devices_) devices.push_back(device.get());
  return devices;
}

Device* Registry::FindDevice(DeviceId id) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto found = devices_.find(id);
  return found == devices_.end() ? nullptr : found->second.get();
}

LockedArena Registry::Open(const Request& request, Token token) {
  handles_.NoteCall();
  Request with_source = request;  // keeps the source until no lock is held
  if (token.version == 1) with_source.source = handles_.SourceOf(token.handle);
  std::optional<LockedArena> locked;
  try {
    locked = At<CpuDevice>(request.device.ordinal).Open(handles_, with_source, token);
  } catch (...) {
    if (handles_.WasUndone(token.handle, request.run)) {
      for (Device* device : Devices()) device->Abandon(token.handle, request.run);
    }
    throw;
  }
  if (!locked) Refuse(request.device, {Verdict::kUnknown, token, 0, request.fingerprint});
  return std::move(*locked);
}

void Registry::Remember(const Signature& signature, uint64_t fingerprint) {
  std::lock_guard<std::mutex> lock(mutex_);
  signatures_.try_emplace(fingerprint, signature);
}

std::string Registry::Explain(DeviceId device, const Rejection& rejection) {
  std::shared_ptr<Arena> here, anywhere;
  for (Device* each : Devices()) {
    const std::shared_ptr<Arena> arena = each->Find(rejection.token.handle);
    if (anywhere == nullptr) anywhere = arena;
    if (each->id() == device) here = arena;
  }
  const Signature* request = nullptr;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = signatures_.find(rejection.fingerprint);
    if (found != signatures_.end()) request = &found->second;  // stays where it is
  }
  return paged_optax::Explain({rejection.verdict, device, rejection.token, rejection.version,
                               handles_.OriginOf(rejection.token.handle), here.get(),
                               anywhere.get(), request});
}

void Registry::Refuse(DeviceId device, const Rejection& rejection) {
  throw StatusError(StatusCode::kFailedPrecondition, Explain(device, rejection));
}

void Registry::ThrowIfRejected(Device& device) {
  const auto rejection = device.TakeRejection();
  if (!rejection) return;
  throw StatusError(StatusCode::kFailedPrecondition,
                    Explain(device.id(), *rejection) + " (An earlier step on " + Name(device.id()) +
                        " was refused and returned an update of zero.)");
}

// A step is refused on each of its devices, and that is one error.
void Registry::ThrowIfRejected() {
  std::exception_ptr first;
  for (Device* device : Devices()) {
    try {
      ThrowIfRejected(*device);
    } catch (const StatusError&) {
      if (first == nullptr) first = std::current_exception();
    }
  }
  if (first != nullptr) std::rethrow_exception(first);
}

std::vector<ArenaReport> Registry::Describe(Token token) {
  ThrowIfRejected();
  std::vector<ArenaReport> reports;
  for (Device* device : Devices()) {
    if (const auto locked = device->LockContents(token.handle)) {
      reports.push_back(Report(*locked));
    }
  }
  if (reports.empty() && token.version != 0) {
    Refuse({Platform::kCpu, 0}, {Verdict::kUnknown, token, 0, 0});
  }
  return reports;
}

Registry::OpenSlot Registry::Read(DeviceId id, Token token) {
  ThrowIfRejected();
  int32_t version = 0;
  {
    Device* device = FindDevice(id);
    auto locked = device == nullptr ? std::nullopt : device->LockContents(token.handle);
    if (!locked) Refuse(id, {Verdict::kUnknown, token, 0, 0});
    const int32_t slot = token.version == 0 ? -1 : FindSlot(locked->header, token.version);
    if (slot >= 0) return {std::move(*locked), slot};
    version = locked->header.version;
  }
  Refuse(id, {Verdict::kStale, token, version, 0});
}

Snapshot Registry::Hold(DeviceId id, Token token) {
  ThrowIfRejected();
  int32_t version = 0;
  {
    Device* device = FindDevice(id);
    auto held = device == nullptr ? std::nullopt : device->HoldContents(token.handle);
    if (!held) Refuse(id, {Verdict::kUnknown, token, 0, 0});
    const int32_t slot = token.version == 0 ? -1 : FindSlot(held->header, token.version);
    if (slot >= 0) return Snapshot(std::move(*held), slot, token.version);
    version = held->header.version;
  }
  Refuse(id, {Verdict::kStale, token, version, 0});
}

std::optional<int32_t> Registry::NewestVersion(int32_t handle) {
  std::optional<int32_t> newest;
  for (Device* device : Devices()) {
    const auto locked = device->LockContents(handle);
    if (locked) newest = std::max(newest.value_or(0), locked->header.version);
  }
  if (newest || handles_.OriginOf(handle) != Handles::Origin::kUnused) return newest;
  return handles_.SourceOf(handle) == nullptr ? 0 : 1;
}

bool Registry::IsAlive(int32_t handle) {
  if (handles_.OriginOf(handle) == Handles::Origin::kUnused) return true;
  const std::vector<Device*> devices = Devices();
  return std::any_of(devices.begin(), devices.end(),
                     [&](Device* device) { return device->Find(handle) != nullptr; });
}

int64_t Registry::Limit(Token token, int64_t device_bytes) {
  ThrowIfRejected();
  int64_t moved = 0;
  bool any = false;
  for (Device* device : Devices()) {
    const auto nbytes = device->Limit(token.handle, device_bytes);
    any = any || nbytes.has_value();
    moved += nbytes.value_or(0);
  }
  if (!any && token.version != 0) Refuse({Platform::kCpu, 0}, {Verdict::kUnknown, token, 0, 0});
  return moved;
}

int64_t Registry::Release(int32_t handle) {
  std::vector<std::shared_ptr<Arena>> freed;
  for (Device* device : Devices()) {
    if (auto arena = device->Remove(handle)) freed.push_back(std::move(arena));
  }
  handles_.Release(handle);
  int64_t nbytes = 0;
  for (const auto& arena : freed) {
    nbytes += arena->memory->geometry().NumBytes();
    // A CPU step under way holds its own pointer and this lock: wait, so that the memory is really
    // gone on return.
    const ContentsLock wait(arena->mutex);
  }
  return nbytes;
}

int64_t Registry::ReleaseAll() {
  const std::vector<int32_t> unused = handles_.Unused();
  std::set<int32_t> handles(unused.begin(), unused.end());
  for (Device* device : Devices()) {
    for (const int32_t handle : device->States()) handles.insert(handle);
  }
  int64_t nbytes = 0;
  for (const int32_t handle : handles) nbytes += Release(handle);
  return nbytes;
}

void Registry::StopPagers() {
  for (Device* device : Devices()) device->StopMoving();
}

int64_t Registry::NumArenas() {
  int64_t count = 0;
  for (Device* device : Devices()) count += static_cast<int64_t>(device->Arenas().size());
  return count;
}

}  // namespace paged_optax
