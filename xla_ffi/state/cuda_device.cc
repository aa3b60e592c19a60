// See cuda_device.h.
#include "state/cuda_device.h"

#include <algorithm>
#include <atomic>

#include "base/cuda_check.h"
#include "state/fill.h"
#include "state/fits.h"

namespace paged_optax {

CudaDevice::CudaDevice(int ordinal, Holds& holds)
    : Device({kPlatform, ordinal}, holds), pager_(ordinal, mutex_, holds, arenas_) {
  const ScopedDevice scope(ordinal);
  mailbox_ = std::make_unique<MappedBuffer>(sizeof(Reports));
}

bool CudaDevice::MayBeFirstUse(const ContentsLock& lock, const Handles& handles, int64_t run,
                               uint64_t fingerprint) const {
  if (handles.num_unused() > 0) return true;
  // Nothing here belongs to such a call: the state comes from another process.
  if (std::none_of(arenas_.begin(), arenas_.end(), [&](const std::shared_ptr<Arena>& arena) {
        return arena->header.layout == LayoutOf(fingerprint, arena->part);
      })) {
    return true;
  }
  const std::vector<int32_t> used = handles.FirstUsedIn(run);
  return std::any_of(used.begin(), used.end(), [&](int32_t handle) {
    const int64_t index = IndexOf(lock, handle);
    return index < 0 || handles.WasUndone(handle, arenas_[index]->run);
  });
}

void CudaDevice::AwaitHolds(ContentsLock& lock, const Token* token, Stream stream) {
  if (!holds().any(id())) return;
  Token stepped;
  CUDA_CHECK(cudaMemcpyAsync(&stepped, token, sizeof(Token), cudaMemcpyDefault, stream));
  CUDA_CHECK(cudaStreamSynchronize(stream));
  if (holds().BeforeChange(lock, {id(), stepped.handle})) pager_.CheckBooks(lock);
}

// The time that an arena is being made, when others have the lock.
class CudaDevice::Binding {
 public:
  Binding(ContentsLock& lock, CudaDevice& device, int32_t handle) : lock_(lock), device_(device) {
    device.binding_ = handle;
  }
  Binding(const Binding&) = delete;
  ~Binding() {
    device_.pager_.EndPlacement(lock_);
    device_.binding_.reset();
    device_.bound_.notify_all();
  }

 private:
  ContentsLock& lock_;
  CudaDevice& device_;
};

std::shared_ptr<Arena> CudaDevice::BindOnFirstUse(ContentsLock& lock, Handles& handles,
                                                  const Request& request, Token token,
                                                  Stream stream) {
  if (request.source == nullptr && !MayStart(handles, request, token)) return nullptr;
  for (;;) {
    lock.Await(bound_, [&] { return !binding_; });
    const int64_t index = IndexOf(lock, token.handle);
    if (index < 0) break;
    if (!handles.WasUndone(token.handle, arenas_[index]->run)) return nullptr;
    Remove(lock, token.handle);
  }
  const Handles::Claim claim = handles.ClaimFirstUse(token.handle, request.run);
  if (claim == Handles::Claim::kNone) return nullptr;
  try {
    auto arena = Make(lock, request, token, stream);
    Append(lock, arena);  // waits for the copies of Fill too
    const bool restarts = request.source == nullptr && token.version != 0;
    if (restarts && claim == Handles::Claim::kFirst) NoteRestart(*arena);
    return arena;
  } catch (const std::exception& error) {
    handles.UndoFirstUse(token.handle, request.run, error);
    throw;
  }
}

// Without the lock, except at its beginning and its end.
std::shared_ptr<Arena> CudaDevice::Make(ContentsLock& lock, const Request& request, Token token,
                                        Stream stream) {
  const Source* source = request.source.get();
  if (source != nullptr) CheckFits(*source, request);
  auto arena = MakeArena(request, token);
  PrepareResidency(*arena);
  const FirstShare share = pager_.BeginPlacement(lock, arena->residency);
  const Binding binding(lock, *this, token.handle);
  const ContentsLock::Pause pause(lock);
  PlaceOnDevice(*arena, share, stream);
  if (source != nullptr) {
    CUDA_CHECK(cudaStreamSynchronize(stream));  // the memory may come in the order of the stream
    Fill(*source, request, *arena);
  }
  return arena;
}

void CudaDevice::EndFirstUse(Handles& handles, const Arena& arena, bool is_restored,
                             Stream stream) {
  if (is_restored) {
    handles.NoteFilled(arena.header.handle, arena.run, arena.signature.num_devices());
  }
  auto is_taken = arena.memory->is_taken();
  if (is_taken == nullptr) return;
  using Flag = std::shared_ptr<std::atomic<bool>>;
  auto* flag = new Flag(std::move(is_taken));
  const auto set = [](void* data) {
    **static_cast<Flag*>(data) = true;
    delete static_cast<Flag*>(data);
  };
  // If it fails, memory counts as promised that has been taken, and nothing worse.
  if (PAGED_CUDA(cudaLaunchHostFunc(stream, set, flag)) != cudaSuccess) delete flag;
}

int64_t CudaDevice::Await(ContentsLock& lock, int32_t handle) {
  lock.Await(bound_, [&] { return binding_ != handle; });
  return IndexOf(lock, handle);
}

int64_t CudaDevice::IndexOf(const ContentsLock&, int32_t handle) const {
  for (size_t i = 0; i < arenas_.size(); ++i) {
    if (arenas_[i]->header.handle == handle) return static_cast<int64_t>(i);
  }
  return -1;
}

void CudaDevice::Append(const ContentsLock&, std::shared_ptr<Arena> arena) {
  const int64_t count = static_cast<int64_t>(arenas_.size());
  if (count == capacity_) {
    const int64_t grown = std::max<int64_t>(64, 2 * capacity_);
    auto buffer = std::make_unique<DeviceBuffer>(grown * sizeof(Header));
    if (count > 0) {
      // Versions advance on the device, so the copy must come after every queued step.
      CUDA_CHECK(cudaDeviceSynchronize());
      CUDA_CHECK(cudaMemcpy(buffer->data(), headers_, count * sizeof(Header), cudaMemcpyDefault));
    }
    buffers_.push_back(std::move(buffer));
    headers_ = static_cast<Header*>(buffers_.back()->data());
    capacity_ = grown;
  }
  CUDA_CHECK(cudaMemcpy(headers_ + count, &arena->header, sizeof(Header), cudaMemcpyDefault));
  // Such copies may return before they are done, and XLA's streams do not wait for this one.
  CUDA_CHECK(cudaStreamSynchronize(cudaStreamLegacy));
  const std::lock_guard<std::mutex> list(list_);
  arenas_.push_back(std::move(arena));
}

std::vector<std::shared_ptr<Arena>> CudaDevice::Arenas() {
  const std::lock_guard<std::mutex> list(list_);
  return arenas_;
}

std::vector<int32_t> CudaDevice::States() {
  const ContentsLock lock(mutex_);
  std::vector<int32_t> handles;
  if (binding_) handles.push_back(*binding_);
  for (const auto& arena : arenas_) handles.push_back(arena->header.handle);
  return handles;
}

std::shared_ptr<Arena> CudaDevice::Find(int32_t handle) {
  ContentsLock lock(mutex_);
  const int64_t index = Await(lock, handle);
  return index < 0 ? nullptr : arenas_[index];
}

std::shared_ptr<Arena> CudaDevice::Look(int32_t handle) {
  const std::lock_guard<std::mutex> list(list_);
  for (const auto& arena : arenas_) {
    if (arena->header.handle == handle) return arena;
  }
  return nullptr;
}

// Once no step is under way.
Header CudaDevice::ReadHeader(const ContentsLock&, int64_t index) const {
  const ScopedDevice scope(id().ordinal);
  CUDA_CHECK(cudaDeviceSynchronize());
  Header header;
  CUDA_CHECK(cudaMemcpy(&header, headers_ + index, sizeof(Header), cudaMemcpyDefault));
  return header;
}

std::optional<LockedArena> CudaDevice::LockContents(int32_t handle) {
  ContentsLock lock(mutex_);
  const int64_t index = Await(lock, handle);
  if (index < 0) return std::nullopt;
  pager_.CheckBooks(lock);
  const Header header = ReadHeader(lock, index);
  return LockedArena{arenas_[index], header, std::move(lock)};
}

std::optional<LockedArena> CudaDevice::SettleContents(int32_t handle) {
  std::shared_ptr<Arena> arena;  // outlives the lock, which the wait gives up
  ContentsLock lock(mutex_);
  int64_t index = Await(lock, handle);
  if (index < 0) return std::nullopt;
  arena = arenas_[index];
  pager_.AwaitIdle(lock, *arena);
  pager_.CheckBooks(lock);
  index = IndexOf(lock, handle);  // others may have come and gone meanwhile
  if (index < 0) return std::nullopt;
  const Header header = ReadHeader(lock, index);
  return LockedArena{std::move(arena), header, std::move(lock)};
}

std::optional<LockedArena> CudaDevice::TakeContents(int32_t handle) {
  std::shared_ptr<Arena> arena;  // outlives the lock, which the waits give up
  ContentsLock lock(mutex_);
  int64_t index = Await(lock, handle);
  if (index < 0) return std::nullopt;
  arena = arenas_[index];
  do {
    pager_.AwaitIdle(lock, *arena);
  } while (holds().BeforeChange(lock, {id(), handle}));
  pager_.CheckBooks(lock);
  index = IndexOf(lock, handle);  // others may have come and gone meanwhile
  if (index < 0) return std::nullopt;
  const Header header = ReadHeader(lock, index);
  return LockedArena{std::move(arena), header, std::move(lock)};
}

void CudaDevice::SetVersions(const LockedArena& locked, const Header& header) {
  const ScopedDevice scope(id().ordinal);
  const int64_t index = IndexOf(locked.lock, header.handle);
  CUDA_CHECK(cudaMemcpy(headers_ + index, &header, sizeof(Header), cudaMemcpyDefault));
  // Such copies may return before they are done, and XLA's streams do not wait for this one.
  CUDA_CHECK(cudaStreamSynchronize(cudaStreamLegacy));
}

std::optional<int64_t> CudaDevice::Limit(int32_t handle, int64_t device_bytes) {
  std::shared_ptr<Arena> arena;  // outlives the lock, which the wait gives up
  ContentsLock lock(mutex_);
  const int64_t index = Await(lock, handle);
  if (index < 0) return std::nullopt;
  arena = arenas_[index];
  return pager_.MoveNow(lock, *arena, device_bytes);
}

// Waits for steps and moves under way.
std::shared_ptr<Arena> CudaDevice::Remove(int32_t handle) {
  std::shared_ptr<Arena> arena;  // outlives the lock
  ContentsLock lock(mutex_);
  if (Await(lock, handle) >= 0) arena = Remove(lock, handle);
  return arena;
}

std::shared_ptr<Arena> CudaDevice::Remove(ContentsLock& lock, int32_t handle) {
  int64_t index = IndexOf(lock, handle);
  std::shared_ptr<Arena> arena = arenas_[index];
  pager_.AwaitIdle(lock, *arena);
  index = IndexOf(lock, handle);  // others may have come and gone meanwhile
  if (index < 0) return nullptr;
  const ScopedDevice scope(id().ordinal);
  CUDA_CHECK(cudaDeviceSynchronize());
  const int64_t last = static_cast<int64_t>(arenas_.size()) - 1;
  if (index < last) {
    CUDA_CHECK(cudaMemcpy(headers_ + index, headers_ + last, sizeof(Header), cudaMemcpyDefault));
  }
  {  // from here on the books say what the device will see, whatever happens
    const std::lock_guard<std::mutex> list(list_);
    arenas_[index] = arenas_[last];
    arenas_.pop_back();
  }
  // Such copies may return before they are done, and XLA's streams do not wait for this one.
  CUDA_CHECK(cudaStreamSynchronize(cudaStreamLegacy));
  return arena;
}

namespace {

// The last word of a report. The device writes it last, so what the host reads after it is whole.
int32_t Load(const void* word) {
  return __atomic_load_n(static_cast<const int32_t*>(word), __ATOMIC_ACQUIRE);
}
void Clear(void* word) { __atomic_store_n(static_cast<int32_t*>(word), 0, __ATOMIC_RELEASE); }
static_assert(static_cast<int32_t>(Verdict::kAccept) == 0);

}  // namespace

bool CudaDevice::HasReports() const {
  Reports* reports = static_cast<Reports*>(mailbox_->host());
  return Load(&reports->rejection.verdict) != 0 || Load(&reports->restart.steps) != 0;
}

std::optional<Rejection> CudaDevice::TakeRejection() {
  const std::lock_guard<std::mutex> lock(taking_);
  Rejection* report = &static_cast<Reports*>(mailbox_->host())->rejection;
  const auto verdict = static_cast<Verdict>(Load(&report->verdict));
  if (verdict == Verdict::kAccept) return std::nullopt;
  const Rejection rejection{verdict, report->token, report->version, report->fingerprint};
  Clear(&report->verdict);
  return rejection;
}

std::optional<Restart> CudaDevice::TakeRestart() {
  const std::lock_guard<std::mutex> lock(taking_);
  Restart* report = &static_cast<Reports*>(mailbox_->host())->restart;
  const int32_t steps = Load(&report->steps);
  if (steps == 0) return std::nullopt;
  const Restart restart{steps, report->handle};
  Clear(&report->steps);
  return restart;
}

}  // namespace paged_optax
