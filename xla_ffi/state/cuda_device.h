// The arenas of one GPU: what the host knows of them, and what the GPU itself knows, in its own
// memory, where kernels find it.
#pragma once

#include <condition_variable>
#include <mutex>

#include "base/device_buffer.h"
#include "base/stream.h"
#include "state/device.h"
#include "state/handles.h"
#include "state/pager.h"

namespace paged_optax {

// In device memory there are the headers of all arenas, and a mailbox for refused steps.
class CudaDevice final : public Device {
 public:
  static constexpr Platform kPlatform = Platform::kCuda;
  CudaDevice(int ordinal, Holds& holds);

  // For the whole of a step's launch.
  ContentsLock Acquire() {
    ContentsLock lock(mutex_);
    pager_.CheckBooks(lock);
    return lock;
  }
  // Before a launch, under whose lock it is called: waits, without the lock, until nobody holds the
  // contents that it may change. Only while somebody holds any does the host look at the token.
  void AwaitHolds(ContentsLock& lock, const Token* token, Stream stream);

  // Whether a token may belong to a state that has no arena here yet, so that the host has to look
  // at it: some state was made and never used, or another device was first in this same execution,
  // or no arena here belongs to such a call.
  bool MayBeFirstUse(const ContentsLock&, const Handles& handles, int64_t run,
                     uint64_t fingerprint) const;
  // Makes the arena of a fresh token, or of one that was restored, if this is its first use: then
  // returns it, for EndFirstUse to be called after the step is launched. If something fails before,
  // the caller undoes the first use (Handles::UndoFirstUse). Gives the lock up meanwhile.
  std::shared_ptr<Arena> BindOnFirstUse(ContentsLock& lock, Handles& handles,
                                        const Request& request, Token token, Stream stream);
  void EndFirstUse(Handles& handles, const Arena& arena, bool is_restored, Stream stream);

  // Calls `launch`, which launches a step, or a later part of one that is open, in between moves;
  // see Pager.
  template <class F>
  void LaunchStep(const ContentsLock& lock, Stream stream, const F& launch) {
    pager_.BeforeStep(lock, stream);
    LaunchInPlace(lock, stream, launch);
  }
  template <class F>
  void LaunchPart(const ContentsLock& lock, Stream stream, const F& launch) {
    pager_.BeforePart(lock, stream);
    LaunchInPlace(lock, stream, launch);
  }

  // Device memory: the headers, null if there are none, and where steps report.
  Header* headers(const ContentsLock&) const { return headers_; }
  int num_headers(const ContentsLock&) const { return static_cast<int>(arenas_.size()); }
  Reports* device_reports() const { return static_cast<Reports*>(mailbox_->device()); }

  std::vector<std::shared_ptr<Arena>> Arenas() override;
  std::vector<int32_t> States() override;
  std::shared_ptr<Arena> Look(int32_t handle) override;
  std::shared_ptr<Arena> Find(int32_t handle) override;
  std::optional<LockedArena> LockContents(int32_t handle) override;
  std::optional<LockedArena> SettleContents(int32_t handle) override;
  std::optional<LockedArena> TakeContents(int32_t handle) override;
  void SetVersions(const LockedArena& locked, const Header& header) override;
  std::optional<int64_t> Limit(int32_t handle, int64_t device_bytes) override;
  std::shared_ptr<Arena> Remove(int32_t handle) override;
  bool HasReports() const override;
  // Does nothing: no device may wait for another one here. The arena is found out, and made anew,
  // at the next first use.
  void Abandon(int32_t /*handle*/, int64_t /*run*/) override {}
  std::optional<Rejection> TakeRejection() override;
  std::optional<Restart> TakeRestart() override;
  void StopMoving() override { pager_.Stop(); }

 private:
  // If it fails, some of its kernels may be on the stream all the same.
  template <class F>
  void LaunchInPlace(const ContentsLock& lock, Stream stream, const F& launch) {
    try {
      launch();
    } catch (...) {
      pager_.AfterStep(lock, stream);
      throw;
    }
    pager_.AfterStep(lock, stream);
  }
  // Number of a state's arena, or -1.
  int64_t IndexOf(const ContentsLock&, int32_t handle) const;
  void Append(const ContentsLock&, std::shared_ptr<Arena> arena);
  Header ReadHeader(const ContentsLock&, int64_t index) const;
  // The number of a state's arena, once it is made if that is under way.
  int64_t Await(ContentsLock& lock, int32_t handle);
  std::shared_ptr<Arena> Make(ContentsLock& lock, const Request& request, Token token,
                              Stream stream);
  std::shared_ptr<Arena> Remove(ContentsLock& lock, int32_t handle);

  class Binding;

  ContentsMutex mutex_;
  // In the order of the headers. They change while both the contents and the list are locked, and
  // may be read while one of them is.
  std::vector<std::shared_ptr<Arena>> arenas_;
  std::mutex list_;
  // The last one holds the headers. Outgrown ones stay until the process ends, because a queued
  // kernel may still read one.
  std::vector<std::unique_ptr<DeviceBuffer>> buffers_;
  Header* headers_ = nullptr;
  int64_t capacity_ = 0;
  std::unique_ptr<MappedBuffer> mailbox_;  // Reports
  std::mutex taking_;                      // out of the mailbox
  std::optional<int32_t> binding_;  // handle of the state whose arena is being made, one at a time
  std::condition_variable bound_;
  Pager pager_;
};

}  // namespace paged_optax
