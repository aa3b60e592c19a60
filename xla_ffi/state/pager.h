// Moves moments between the memory of one GPU and the host's, while training goes on: a thread with
// a stream of its own, woken by steps and by evict and prefetch. What moves is the planner's
// decision. Owned by DeviceTable.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>

#include "base/cuda_check.h"
#include "memory/planner.h"

namespace paged_optax {

struct Arena;
struct DeviceTable;

class Pager {
 public:
  explicit Pager(DeviceTable& table) : table_(table) {}
  Pager(const Pager&) = delete;

  // The table's mutex must be held for all that follows, except for Stop.

  // For a state that is about to be made.
  FirstShare FirstPlacement(const Residency& newcomer);
  // Before a step is launched: looks at the device's free memory, decides what should move, and
  // lets the thread move the bytes of one step. Never waits for the device or the thread.
  void BeforeStep(void* stream);
  void AfterStep(void* stream);
  // Limits a state to `nbytes` of device memory (negative: no limit), and waits until it is where
  // it should be. Returns the bytes that moved.
  int64_t MoveNow(std::unique_lock<std::mutex>& lock, Arena& arena, int64_t nbytes);
  // Waits for a move of this state that is under way.
  void AwaitIdle(std::unique_lock<std::mutex>& lock, const Arena& arena);

  // Ends the thread, before the process does.
  void Stop();

 private:
  Residencies States() const;
  bool Pick(Step* step);
  void Run();
  void Execute(std::unique_lock<std::mutex>& lock, const std::shared_ptr<Arena>& arena,
               int32_t segments);
  void Fail(Arena& arena, const char* what);
  void Wake();
  void MakeEvents();
  void TakeTime(const Residencies& states);

  DeviceTable& table_;
  Planner planner_;
  int64_t allowance_ = 0;  // bytes that may still move in the background
  int urgent_ = 0;         // calls that wait for moves, which then need no allowance
  std::thread thread_;
  std::condition_variable wake_, settled_;
  bool stopping_ = false;
  bool has_complained_ = false;
  cudaStream_t stream_ = nullptr;
  // Order between steps and moves that change addresses: each waits, on the device, for the other.
  cudaEvent_t stepped_ = nullptr, moved_ = nullptr;
  bool has_stepped_ = false, has_moved_ = false;
  // Around a step, while the device is full.
  cudaEvent_t began_ = nullptr, ended_ = nullptr;
  enum class Timing { kNone, kBegun, kEnded } timing_ = Timing::kNone;
};

}  // namespace paged_optax
