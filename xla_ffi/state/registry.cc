// See registry.h.
#include "state/registry.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <set>

#include "base/notice.h"
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
    const std::shared_ptr<Arena> arena = each->Look(rejection.token.handle);
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

void Registry::NoteRefused(Token token, const std::string& reason) {
  const std::string text =
      token.version >= 0 ? reason
                         : reason +
                               " The step was lost after it had begun: each parameter got its "
                               "whole update or none, and the count did not advance.";
  if (!refusals_.Add(token, text)) return;
  PostNotice({0, 0, text, Notice::Kind::kRefusal});
}

void Registry::NoteRestarted(Restart restart) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!restarted_.insert(restart.handle).second) return;
  }
  PostNotice({0, 0,
              "a step from an initial state ended the training that had begun from the same state "
              "before, after " +
                  std::to_string(restart.steps) +
                  " steps: their moments count as zero now. If that was not meant (a notebook cell "
                  "that ran again?), keep the state that update returned; "
                  "paged_optax.newest(opt_state) finds it while it is the newest. For a new "
                  "training make a new state with init(params), and release the old one."});
}

void Registry::CollectReports() {
  for (Device* device : Devices()) {
    if (!device->HasReports()) continue;
    if (const auto rejection = device->TakeRejection()) {
      const std::string text = Explain(device->id(), *rejection);
      handles_.NoteMissed(rejection->token.handle);
      NoteRefused(rejection->token, text);
    }
    if (const auto restart = device->TakeRestart()) NoteRestarted(*restart);
  }
}

bool Registry::AnyRefused() {
  if (refusals_.any()) return true;
  const std::vector<Device*> devices = Devices();
  return std::any_of(devices.begin(), devices.end(),
                     [](Device* device) { return device->HasReports(); });
}

void Registry::ForgetRefused(int32_t handle) {
  CollectReports();
  (void)refusals_.Take(handle);
}

void Registry::ThrowIfRefused(std::optional<int32_t> handle) {
  CollectReports();
  if (const auto text = refusals_.Take(handle)) {
    throw StatusError(StatusCode::kFailedPrecondition, *text);
  }
}

std::vector<ArenaReport> Registry::Describe(Token token) {
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

Registry::OpenSlot Registry::FindContents(const Wanted& wanted, LockContents lock) {
  const auto& [id, token] = wanted;
  int32_t version = 0;
  {
    Device* device = FindDevice(id);
    auto locked = device == nullptr ? std::nullopt : (device->*lock)(token.handle);
    if (!locked) Refuse(id, {Verdict::kUnknown, token, 0, 0});
    const int32_t slot = FindSlot(locked->header, token.version);
    if (slot >= 0) return {std::move(*locked), slot};
    version = locked->header.version;
  }
  Refuse(id, {Verdict::kStale, token, version, 0});
}

Registry::OpenSlot Registry::Read(DeviceId device, Token token) {
  return FindContents({device, token}, &Device::LockContents);
}

std::vector<Snapshot> Registry::HoldAll(const std::vector<Wanted>& wanted) {
  std::vector<Holds::Place> places;
  for (const auto& [device, token] : wanted) places.emplace_back(device, token.handle);
  // Each time but the last an update of one of the states began meanwhile. Where it was not skipped
  // or refused, few are needed: the contents of before are gone.
  constexpr int kTries = 1000;
  for (int i = 0; i < kTries; ++i) {
    const auto hold = std::make_shared<Hold>(holds_, places);
    const int64_t changes = hold->changes();
    std::vector<Snapshot> snapshots;
    for (const Wanted& each : wanted) {
      const OpenSlot open = FindContents(each, &Device::SettleContents);
      snapshots.emplace_back(hold, open.locked.arena, open.slot, each.token.version);
    }
    if (hold->Begin(changes)) return snapshots;
  }
  throw StatusError(
      StatusCode::kFailedPrecondition,
      "paged_optax: the moments cannot be read, because other threads keep calling updates of this "
      "optimizer state, which are refused or skipped. Read them when none is under "
      "way.");
}

std::vector<ArenaReport> Registry::DescribeAll() {
  std::vector<ArenaReport> reports;
  for (Device* device : Devices()) {
    for (const auto& arena : device->Arenas()) {
      const auto locked = device->LockAnyway(arena->header.handle);  // it may be gone by now
      if (locked) reports.push_back(Report(*locked));
    }
  }
  return reports;
}

std::vector<Header> Registry::ReadHeaders(int32_t handle) {
  const std::vector<Device*> devices = Devices();
  std::vector<Holds::Place> places;
  for (const Device* device : devices) places.emplace_back(device->id(), handle);
  const Hold hold(holds_, std::move(places));  // announced only
  std::vector<Header> headers;
  constexpr int kLooks = 10;  // what comes out is compared in any case
  for (int i = 0; i < kLooks; ++i) {
    headers.clear();
    const int64_t changes = hold.changes();
    for (Device* device : devices) {
      const auto locked = device->LockContents(handle);
      // A GPU keeps what another device undid, until the state is used again.
      if (locked && !handles_.WasUndone(handle, locked->arena->run)) {
        headers.push_back(locked->header);
      }
    }
    if (hold.changes() == changes) break;
  }
  return headers;
}

std::optional<Registry::Newest> Registry::FindNewest(int32_t handle) {
  const std::vector<Header> headers = ReadHeaders(handle);
  if (headers.empty()) {
    if (!handles_.MayBeUsed(handle)) return std::nullopt;
    return handles_.SourceOf(handle) == nullptr ? Newest{0, 0, 0, 0} : Newest{1, kNoCount, 1, 0};
  }
  const Header& first = headers.front();
  std::optional<Newest> newest;
  for (int32_t slot = 0; slot < first.num_slots; ++slot) {
    const int32_t version = first.versions[slot];
    const bool is_everywhere =
        std::all_of(headers.begin(), headers.end(),
                    [&](const Header& header) { return FindSlot(header, version) >= 0; });
    if (version <= 0 || !is_everywhere || (newest && newest->version == first.version)) continue;
    newest = Newest{version, first.counts[slot], first.started, first.first_version};
  }
  const bool none_was_used = std::all_of(headers.begin(), headers.end(),
                                         [](const Header& header) { return header.started == 0; });
  if (!newest && none_was_used) {
    const int32_t zero = first.first_version;
    return Newest{zero, zero == 0 ? 0 : kNoCount, 0, zero};
  }
  if (!newest && headers.size() == 1) {
    throw StatusError(
        StatusCode::kFailedPrecondition,
        "paged_optax: no moments of this optimizer state are whole: a step or a reset "
        "failed in the middle, or another thread has one under way. If none has, "
        "restore them from a checkpoint, or make a new state with init(params), after "
        "paged_optax.release(opt_state), which frees these moments.");
  }
  if (!newest) {
    throw StatusError(StatusCode::kFailedPrecondition,
                      "paged_optax: the devices have different moments of this optimizer state: a "
                      "step ran on some of them and was refused or failed on others, and none has "
                      "kept the moments before it, or another thread has a step under way. If none "
                      "has, make a new state with init(params), after "
                      "paged_optax.release(opt_state), which frees these moments.");
  }
  return newest;
}

std::optional<int32_t> Registry::NewestVersion(int32_t handle) {
  std::optional<int32_t> newest;
  for (Device* device : Devices()) {
    const auto locked = device->LockContents(handle);
    if (locked) newest = std::max(newest.value_or(0), locked->header.version);
  }
  if (newest || !handles_.MayBeUsed(handle)) return newest;
  return handles_.SourceOf(handle) == nullptr ? 0 : 1;
}

bool Registry::IsAlive(int32_t handle) {
  if (handles_.MayBeUsed(handle)) return true;
  const std::vector<Device*> devices = Devices();
  return std::any_of(devices.begin(), devices.end(),
                     [&](Device* device) { return device->Find(handle) != nullptr; });
}

namespace {

// The newest version that can be used: a step that failed while it was open left a newer one.
int32_t NewestContents(const Header& header) {
  if (FindSlot(header, header.version) >= 0) return header.version;
  return *std::max_element(header.versions, header.versions + header.num_slots);
}

constexpr char kPartOfTheReset[] =
    ". Part of the reset was made, so the moments of this optimizer state cannot be trusted any "
    "more (with replay=True, those before the last step can). Make a new state with init(params).";

}  // namespace

int32_t Registry::Rewrite(DeviceId id, Token token, const std::vector<LeafRewrite>& leaves) {
  // One at a time: each waits until it is alone with the contents.
  const std::lock_guard<std::mutex> one_by_one(rewriting_);
  int32_t version = 0;
  {
    Device* device = FindDevice(id);
    auto locked = device == nullptr ? std::nullopt : device->TakeContents(token.handle);
    if (!locked) Refuse(id, {Verdict::kUnknown, token, 0, 0});
    Header header = locked->header;
    version = header.version;
    const int32_t slot = FindSlot(header, token.version);
    if (slot >= 0 && NewestContents(header) == token.version) {
      CheckLeaves(*locked, leaves);
      const Header before = header;
      // A step that is open, or failed while it was, must not write what comes after these.
      for (int32_t& each : header.versions) each = std::max(each, 0);
      header.versions[slot] = 0;  // nobody gets contents that are written in part
      try {
        device->SetVersions(*locked, header);
      } catch (const StatusError&) {  // nothing was written
        device->SetVersions(*locked, before);
        throw;
      }
      try {
        WriteLeaves(*locked, slot, leaves);
        header.version = header.versions[slot] = NextVersion(header.version);
        device->SetVersions(*locked, header);
      } catch (const StatusError& error) {
        throw StatusError(error.code(), std::string(error.what()) + kPartOfTheReset);
      }
      return header.version;
    }
  }
  Refuse(id, {Verdict::kStale, token, version, 0});
}

int64_t Registry::Limit(Token token, int64_t device_bytes) {
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
  ForgetRefused(handle);
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
  CollectReports();
  while (refusals_.Take(std::nullopt)) {
  }
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
