// Moves moments between the memory of one GPU and the host's, while training goes on: a thread with
// a stream of its own, woken by steps and by evict and prefetch. What moves is the planner's
// decision.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "base/cuda_check.h"
#include "base/stream.h"
#include "memory/planner.h"
#include "state/arena.h"
#include "state/hold.h"
#include "state/lock.h"

namespace paged_optax {

class Pager {
 public:
  // Of the GPU's arenas, which `mutex` guards. While somebody holds one, or has announced it,
  // nothing starts to move. All three must outlive the pager.
  Pager(int ordinal, ContentsMutex& mutex, Holds& holds,
        const std::vector<std::shared_ptr<Arena>>& arenas)
      : ordinal_(ordinal), mutex_(mutex), holds_(holds), arenas_(arenas) {}
  Pager(const Pager&) = delete;

  // For a state that is about to be made, which takes long and gives the lock up. Nothing moves
  // until it is there.
  FirstShare BeginPlacement(const ContentsLock&, const Residency& newcomer);
  void EndPlacement(const ContentsLock&);
  // Throws if the device may see moments in other places than the host.
  void CheckBooks(const ContentsLock&) const;
  // Before a step is launched: looks at the device's free memory, decides what should move, and
  // lets the thread move the bytes of one step. Never waits for the device or the thread.
  void BeforeStep(const ContentsLock&, Stream stream);
  void AfterStep(const ContentsLock&, Stream stream);
  // Before a later part of a step is launched; AfterStep comes after it too.
  void BeforePart(const ContentsLock&, Stream stream);
  // Limits a state to `nbytes` of device memory (negative: no limit), and waits until it is where
  // it should be. Returns the bytes that moved.
  int64_t MoveNow(ContentsLock& lock, Arena& arena, int64_t nbytes);
  // Waits for a move of this state that is under way.
  void AwaitIdle(ContentsLock& lock, const Arena& arena);

  // Ends the thread, before the process does.
  void Stop();

 private:
  Residencies States(const ContentsLock&) const;
  // What should move next; and whether it may.
  bool Next(const ContentsLock&, Step* step);
  bool Pick(const ContentsLock&, Step* step);
  void Run();
  void Execute(ContentsLock& lock, Arena& arena, const Step& step);
  void Enqueue(const ContentsLock&, Arena& arena, const Move& move, int32_t segments);
  void Fail(const ContentsLock&, Arena& arena, const char* what);
  void Wake(const ContentsLock&);
  void Start(const ContentsLock&);
  void Plan(const ContentsLock&);
  void RecordMove(const ContentsLock&);
  void MakeEvents();
  void TakeTime(const Residencies& states);

  const int ordinal_;
  ContentsMutex& mutex_;
  Holds& holds_;
  const std::vector<std::shared_ptr<Arena>>& arenas_;
  Planner planner_;
  int64_t allowance_ = 0;  // bytes that may still move in the background
  bool is_placing_ = false;
  std::string broken_;  // why the device may see moments in other places than the host
  int urgent_ = 0;      // calls that wait for moves, which then need no allowance
  std::thread thread_;
  std::condition_variable wake_, settled_;
  bool stopping_ = false;
  bool has_complained_ = false;
  Stream stream_ = nullptr;  // of the thread alone
  // Order between steps and moves that change addresses: each waits, on the device, for the other.
  cudaEvent_t stepped_ = nullptr, moved_ = nullptr;
  bool has_stepped_ = false, has_moved_ = false;
  // Around a step, while the device is full.
  cudaEvent_t began_ = nullptr, ended_ = nullptr;
  enum class Timing { kNone, kBegun, kEnded } timing_ = Timing::kNone;
};

}  // namespace paged_optax
