// See registry.h.
#include "state/registry.h"

#include <algorithm>
#include <cstdlib>
#include <exception>
#include <random>
#include <sstream>

#include "base/status.h"

#if PAGED_OPTAX_CUDA
#include "base/cuda_check.h"
#include "state/device_table.h"
#endif

namespace paged_optax {
namespace {

constexpr size_t kRecent = 1024;  // executions that may be under way at once, with room to spare

}  // namespace

Registry& Registry::Get() {
  static Registry* registry = new Registry();
  return *registry;
}

// Handles start at a random number, so that a token from another process, restored without its
// moments, is recognised instead of finding somebody else's.
Registry::Registry()
    : own_{static_cast<int32_t>(std::random_device{}() % (1u << 29) + (1u << 20)), 0} {
  own_.next = own_.first;
}

// Above all handles that a process issues on its own.
void Registry::SetSharedBase(int32_t random) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (shared_.first != 0) return;
  shared_.first = shared_.next = (1 << 30) + (random & ((1 << 29) - 1));
}

bool Registry::WasIssuedHere(int32_t handle) const {
  return own_.Contains(handle) || shared_.Contains(handle);
}

int32_t Registry::IssueHandle(DeviceId device, int64_t run, int32_t seed, bool shared) {
  std::lock_guard<std::mutex> lock(mutex_);
  for (Issue& issue : issues_) {
    if (issue.run == run && issue.seed == seed && issue.devices.insert(device).second) {
      return issue.handle;
    }
  }
  const int32_t handle = (shared && shared_.first != 0 ? shared_ : own_).next++;
  issues_.push_back({run, seed, handle, {device}});
  if (issues_.size() > kRecent) issues_.pop_front();
  unused_.insert(handle);
  num_unused_ = static_cast<int64_t>(unused_.size());
  return handle;
}

bool Registry::IsFirstUse(int32_t handle, int64_t run) {
  if (unused_.count(handle)) return true;
  // Another device may have been first in the same execution.
  return std::any_of(bound_.begin(), bound_.end(), [&](const Bound& bound) {
    return bound.handle == handle && bound.run == run;
  });
}

void Registry::NoteBound(int32_t handle, int64_t run) {
  if (unused_.erase(handle) == 0) return;
  bound_.push_back({handle, run});
  if (bound_.size() > kRecent) bound_.pop_front();
  num_unused_ = static_cast<int64_t>(unused_.size());
}

void Registry::Remember(const Signature& signature, uint64_t fingerprint) {
  std::lock_guard<std::mutex> lock(mutex_);
  signatures_.try_emplace(fingerprint, signature);
}

std::shared_ptr<Arena> Registry::Open(const Request& request, Token token) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto key = std::make_pair(token.handle, request.device);
    const auto found = cpu_arenas_.find(key);
    if (found != cpu_arenas_.end()) return found->second;
    if (token.version == 0 && IsFirstUse(token.handle, request.run)) {
      const auto arena = MakeArena(request, token);
      PlaceOnHost(*arena);
      cpu_arenas_.emplace(key, arena);
      NoteBound(token.handle, request.run);
      return arena;
    }
  }
  throw StatusError(StatusCode::kFailedPrecondition,
                    Explain(Verdict::kUnknown, request.device, token, 0, request.fingerprint));
}

std::shared_ptr<Arena> Registry::Find(DeviceId device, int32_t handle) {
  for (auto& arena : FindAll(handle)) {
    if (arena->device == device) return arena;
  }
  return nullptr;
}

std::vector<std::shared_ptr<Arena>> Registry::FindAll(int32_t handle) {
  std::vector<std::shared_ptr<Arena>> arenas;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    const DeviceId first{Platform::kCpu, 0};
    for (auto found = cpu_arenas_.lower_bound({handle, first});
         found != cpu_arenas_.end() && found->first.first == handle; ++found) {
      arenas.push_back(found->second);
    }
  }
#if PAGED_OPTAX_CUDA
  for (DeviceTable* table : Tables()) {
    std::lock_guard<std::mutex> lock(table->mutex);
    if (auto arena = table->Find(handle)) arenas.push_back(arena);
  }
#endif
  return arenas;
}

std::string Registry::Explain(Verdict verdict, DeviceId device, Token token, int32_t version,
                              uint64_t call_fingerprint) {
  std::ostringstream text;
  text << "paged_optax: ";
  if (verdict == Verdict::kStale) {
    const std::shared_ptr<Arena> arena = Find(device, token.handle);
    const bool replay = arena != nullptr && arena->signature.num_slots() > 1;
    text << "this optimizer state is not the newest one: its moments were at version "
         << token.version << ", and later steps have since moved them to version " << version
         << ". Moments change in place. ";
    if (replay) {
      text << "With replay=True the last step can be run again, but no step before it, and a state"
              " cannot go on in two branches. ";
    } else {
      text << "The state was used twice: rolled back, forked into two, kept by jnp.where or"
              " optax.MultiSteps after its update had run, or a step was tried again. To run the"
              " last step again, build the optimizer with replay=True, which keeps two copies of"
              " the moments; to accumulate gradients use paged_optax.MultiSteps; to skip steps put"
              " jax.lax.cond around tx.update. ";
    }
    text << "Go on from the newest state or from a new init(params). The moments were left as they"
            " were.";
    return text.str();
  }
  const auto arenas = FindAll(token.handle);
  std::lock_guard<std::mutex> lock(mutex_);
  if (verdict == Verdict::kOtherLayout) {
    const auto call = signatures_.find(call_fingerprint);
    for (const auto& arena : arenas) {
      if (arena->device == device && call != signatures_.end()) {
        text << Signature::Difference(arena->signature, call->second);
        return text.str();
      }
    }
    text << "the gradients do not have the leaves that the moments were made for. Make a new state "
            "with init(params).";
    return text.str();
  }
  const bool issued_here = WasIssuedHere(token.handle);
  if (!arenas.empty()) {
    text << "the moments of this optimizer state are on " << Name(arenas[0]->device)
         << " but the step ran on " << Name(device)
         << ". Moments do not follow a token from device to device: run the step where the state "
            "was first used, or make a new state with init(params).";
  } else if (issued_here && unused_.count(token.handle)) {
    text << "this optimizer state claims version " << token.version
         << " but was never used. Use the state that init or update returned.";
  } else if (issued_here) {
    text << "the moments of this optimizer state were released. Make a new state with "
            "init(params).";
  } else {
    text << "the moments of this optimizer state are not in this process: the state was restored "
            "from a checkpoint, unpickled or sent here as a bare token, and a token carries no "
            "moments. Make a new state with init(params); parameters can be restored as usual.";
  }
  return text.str();
}

// Keeps steps from starting and waits for those under way.
std::unique_lock<std::mutex> Registry::LockContents(Arena& arena) {
#if PAGED_OPTAX_CUDA
  if (arena.device.platform == Platform::kCuda) {
    DeviceTable& table = Table(arena.device.ordinal);
    std::unique_lock<std::mutex> lock(table.mutex);
    ScopedDevice scope(table.ordinal);
    CUDA_CHECK(cudaDeviceSynchronize());
    return lock;
  }
#endif
  return std::unique_lock<std::mutex>(arena.mutex);
}

// Contents must be locked.
Header Registry::CurrentHeader(const Arena& arena) {
#if PAGED_OPTAX_CUDA
  if (arena.device.platform == Platform::kCuda) {
    return Table(arena.device.ordinal).ReadHeader(arena.header.handle);
  }
#endif
  return arena.header;
}

std::vector<ArenaReport> Registry::Describe(Token token) {
  ThrowIfRejected();
  std::vector<ArenaReport> reports;
  for (const auto& arena : FindAll(token.handle)) {
    const std::unique_lock<std::mutex> lock = LockContents(*arena);
    reports.push_back(Report(*arena, CurrentHeader(*arena).version));
  }
  if (reports.empty() && token.version != 0) {
    throw StatusError(StatusCode::kFailedPrecondition,
                      Explain(Verdict::kUnknown, {Platform::kCpu, 0}, token, 0, 0));
  }
  return reports;
}

void Registry::Read(DeviceId device, Token token, int64_t offset, int64_t nbytes,
                    void* destination) {
  const std::shared_ptr<Arena> arena = Find(device, token.handle);
  if (arena == nullptr) {
    throw StatusError(StatusCode::kFailedPrecondition,
                      Explain(Verdict::kUnknown, device, token, 0, 0));
  }
  if (offset < 0 || nbytes < 0 || offset + nbytes > arena->memory->geometry().slot_bytes) {
    throw StatusError(StatusCode::kInvalidArgument, "read outside the arena");
  }
  // Held during the copy: no step may start meanwhile.
  std::unique_lock<std::mutex> lock = LockContents(*arena);
  const Header header = CurrentHeader(*arena);
  const int32_t slot = token.version == 0 ? -1 : FindSlot(header, token.version);
  if (slot < 0) {
    lock.unlock();  // Explain takes it
    throw StatusError(StatusCode::kFailedPrecondition,
                      Explain(Verdict::kStale, device, token, header.version, 0));
  }
  arena->memory->Read(slot, offset, nbytes, destination);
}

int64_t Registry::Release(int32_t handle) {
  int64_t nbytes = 0;
  std::vector<std::shared_ptr<Arena>> freed;
  for (const auto& arena : FindAll(handle)) {
#if PAGED_OPTAX_CUDA
    if (arena->device.platform == Platform::kCuda) {
      DeviceTable& table = Table(arena->device.ordinal);
      std::unique_lock<std::mutex> lock(table.mutex);
      table.pager.AwaitIdle(lock, *arena);
      ScopedDevice scope(table.ordinal);
      CUDA_CHECK(cudaDeviceSynchronize());
      table.Remove(handle);
    }
#endif
    nbytes += arena->memory->geometry().NumBytes();
    freed.push_back(arena);
  }
  {
    std::lock_guard<std::mutex> lock(mutex_);
    for (const auto& arena : freed) cpu_arenas_.erase({handle, arena->device});
    unused_.erase(handle);
    num_unused_ = static_cast<int64_t>(unused_.size());
  }
  // A CPU step under way holds its own reference and the mutex: wait, so that the memory is really
  // gone on return.
  for (const auto& arena : freed) std::lock_guard<std::mutex> wait(arena->mutex);
  return nbytes;
}

int64_t Registry::ReleaseAll() {
  std::set<int32_t> handles;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    handles = unused_;
    for (const auto& [key, arena] : cpu_arenas_) handles.insert(key.first);
  }
#if PAGED_OPTAX_CUDA
  for (DeviceTable* table : Tables()) {
    std::lock_guard<std::mutex> lock(table->mutex);
    for (const auto& arena : table->arenas) handles.insert(arena->header.handle);
  }
#endif
  int64_t nbytes = 0;
  for (const int32_t handle : handles) nbytes += Release(handle);
  return nbytes;
}

int64_t Registry::Limit(Token token, int64_t device_bytes) {
  ThrowIfRejected();
  int64_t moved = 0;
  const auto arenas = FindAll(token.handle);
  if (arenas.empty() && token.version != 0) {
    throw StatusError(StatusCode::kFailedPrecondition,
                      Explain(Verdict::kUnknown, {Platform::kCpu, 0}, token, 0, 0));
  }
  for (const auto& arena : arenas) {
#if PAGED_OPTAX_CUDA
    if (arena->device.platform == Platform::kCuda) {
      DeviceTable& table = Table(arena->device.ordinal);
      std::unique_lock<std::mutex> lock(table.mutex);
      moved += table.pager.MoveNow(lock, *arena, device_bytes);
      continue;
    }
#endif
    std::lock_guard<std::mutex> lock(arena->mutex);
    const int64_t before = arena->memory->ResidentBytes();
    if (device_bytes < 0) {
      arena->memory->PageIn();
    } else {
      arena->memory->PageOut(device_bytes);
    }
    moved += std::abs(arena->memory->ResidentBytes() - before);
  }
  return moved;
}

void Registry::StopPagers() {
#if PAGED_OPTAX_CUDA
  for (DeviceTable* table : Tables()) table->pager.Stop();
#endif
}

int64_t Registry::NumArenas() {
  int64_t count = 0;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    count = static_cast<int64_t>(cpu_arenas_.size());
  }
#if PAGED_OPTAX_CUDA
  for (DeviceTable* table : Tables()) {
    std::lock_guard<std::mutex> lock(table->mutex);
    count += static_cast<int64_t>(table->arenas.size());
  }
#endif
  return count;
}

int64_t Registry::NumUnused() { return num_unused_; }

#if PAGED_OPTAX_CUDA

DeviceTable& Registry::Table(int ordinal) {
  std::lock_guard<std::mutex> lock(mutex_);
  std::unique_ptr<DeviceTable>& table = tables_[ordinal];
  if (table == nullptr) {
    ScopedDevice scope(ordinal);
    table = std::make_unique<DeviceTable>(ordinal);
  }
  return *table;
}

bool Registry::MayBeFirstUse(int64_t run, const DeviceTable& table) {
  if (num_unused_ > 0) return true;
  std::lock_guard<std::mutex> lock(mutex_);
  return std::any_of(bound_.begin(), bound_.end(), [&](const Bound& bound) {
    return bound.run == run && table.Find(bound.handle) == nullptr;
  });
}

void Registry::BindOnFirstUse(const Request& request, Token token, DeviceTable& table,
                              void* stream) {
  if (token.version != 0 || table.Find(token.handle) != nullptr) return;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!IsFirstUse(token.handle, request.run)) return;
  }
  const auto arena = MakeArena(request, token);
  PlaceOnDevice(*arena, table, stream);
  table.Append(arena);
  std::lock_guard<std::mutex> lock(mutex_);
  NoteBound(token.handle, request.run);
}

std::vector<DeviceTable*> Registry::Tables() {
  std::vector<DeviceTable*> tables;
  std::lock_guard<std::mutex> lock(mutex_);
  for (auto& [ordinal, table] : tables_) tables.push_back(table.get());
  return tables;
}

void Registry::ThrowIfRejected(DeviceTable& table) {
  Rejection rejection;
  {
    std::lock_guard<std::mutex> lock(table.mutex);
    if (!table.TakeRejection(&rejection)) return;
  }
  const DeviceId device{Platform::kCuda, table.ordinal};
  throw StatusError(StatusCode::kFailedPrecondition,
                    Explain(rejection.verdict, device, rejection.token, rejection.version,
                            rejection.fingerprint) +
                        " (An earlier step on " + Name(device) +
                        " was refused and returned an update of zero.)");
}

// A step is refused on each of its devices, and that is one error.
void Registry::ThrowIfRejected() {
  std::exception_ptr first;
  for (DeviceTable* table : Tables()) {
    try {
      ThrowIfRejected(*table);
    } catch (const StatusError&) {
      if (first == nullptr) first = std::current_exception();
    }
  }
  if (first != nullptr) std::rethrow_exception(first);
}

#else

void Registry::ThrowIfRejected() {}

#endif  // PAGED_OPTAX_CUDA

}  // namespace paged_optax
