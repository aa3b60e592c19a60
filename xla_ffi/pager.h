// Moves moments between the memory of one GPU and the host's, while training goes on: a thread with
// a stream of its own, woken by steps and by evict and prefetch. Owned by DeviceTable.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

#include "cuda_check.h"
#include "placement.h"

namespace paged_optax {

struct Arena;
struct DeviceTable;
struct Geometry;
struct PlacementPolicy;

// Where a new state starts.
struct FirstShare {
  int32_t segments;       // resident from the start
  int64_t missing_bytes;  // that it would have besides, were the GPU's memory not short
};

class Pager {
 public:
  explicit Pager(DeviceTable& table) : table_(table) {}
  Pager(const Pager&) = delete;

  // The table's mutex must be held for all that follows, except for Stop.

  // For a state that is about to be made.
  FirstShare FirstPlacement(const Geometry& geometry, const PlacementPolicy& policy);
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
  struct Task {
    std::shared_ptr<Arena> arena;
    int32_t first, count;
    bool to_device;
  };

  void SetTargets(int64_t capacity, bool at_once);
  bool Pick(Task* task);
  void Run();
  void Execute(std::unique_lock<std::mutex>& lock, const Task& task);
  void Wake();
  int64_t ResidentBytes() const;
  int64_t HeldBytes(int64_t free_bytes);
  // Device memory that moments may take besides what they have; negative: that they should give up.
  int64_t Room();
  int64_t Headroom() const;

  DeviceTable& table_;
  SteadyCapacity capacity_;
  int64_t allowance_ = 0;  // bytes that may still move in the background
  std::thread thread_;
  std::condition_variable wake_, settled_;
  bool stopping_ = false;
  std::string failure_;  // of the last move, until the next evict or prefetch
  cudaStream_t stream_ = nullptr;
  // Order between steps and moves that change addresses: each waits, on the device, for the other.
  cudaEvent_t stepped_ = nullptr, moved_ = nullptr;
  bool has_stepped_ = false, has_moved_ = false;
};

}  // namespace paged_optax
