// How much of each state's moments should be in a GPU's memory, and what to move next: arithmetic
// without CUDA, so that it is tested without a GPU.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "layout/geometry.h"

namespace paged_optax {

inline constexpr int64_t kNoLimit = std::numeric_limits<int64_t>::max();

// How much of a GPU's memory one state has, may have and should have. Numbers of segments are those
// of leading segments.
struct Residency {
  Geometry geometry = {};
  int64_t device_bytes = -1;  // budget of all states together, as this one sees it; negative: none
  int64_t headroom_bytes = 0;
  // Managed memory: the driver keeps the device memory of segments that left, and gives it to the
  // next call that finds none free.
  bool is_kept = false;

  int32_t segments = 0;   // that are in the GPU's memory
  int32_t target = 0;     // that should be there
  bool moving = false;    // whether a move is under way
  int32_t moving_to = 0;  // how many will be there after it
  int32_t held = 0;       // that the driver holds device memory for; see Planner::Room
  int64_t limit = -1;     // most bytes that may be there, set by hand; negative for none
  std::string failure;    // of the last move; then only evict and prefetch move it again

  int64_t moved_bytes = 0;  // since the state was made
  double moving_seconds = 0.0;
};

using Residencies = std::vector<Residency*>;

// What a state asks for.
struct Demand {
  int64_t wanted;  // bytes that it would take
  int64_t budget;  // takes no more once the states together have this many; negative: no budget
};

// Shares of `capacity` bytes, max-min fair: all shares grow alike. One stops when its state has
// what it wants or meets its budget, and all stop when nothing is left. (D. Bertsekas, R. Gallager,
// "Data Networks", 2nd edition, 1992, section 6.5.2.)
std::vector<int64_t> FairShares(const std::vector<Demand>& demands, int64_t capacity);

// How much of a GPU's memory moments may take, with hysteresis: less counts at once, and more
// counts after it has lasted for kSteps steps.
class SteadyCapacity {
 public:
  static constexpr int kSteps = 8;

  int64_t Observe(int64_t capacity) {
    if (count_ == 0) recent_.fill(capacity);
    recent_[count_++ % kSteps] = capacity;
    return *std::min_element(recent_.begin(), recent_.end());
  }

 private:
  std::array<int64_t, kSteps> recent_{};
  size_t count_ = 0;
};

// Whether a change of a state's resident bytes is worth its moves. A state always shrinks. It grows
// by a sixteenth of itself or more, or to all that it wants, so that it does not go back and forth.
inline bool IsWorthMoving(int64_t resident, int64_t share, int64_t wanted) {
  if (share <= resident) return share < resident;
  return share >= wanted || share - resident >= wanted / 16;
}

// A move to be made: the number of the state, and how many segments it has afterwards.
struct Step {
  size_t state;
  int32_t segments;
};

// Where a new state starts.
struct FirstShare {
  int32_t segments;       // resident from the start
  int64_t missing_bytes;  // that it would have too if the GPU's memory were not short
};

// Decides for one GPU. `free_bytes` is always what the driver reports at the moment.
class Planner {
 public:
  // For a state that is not yet among the others.
  FirstShare Place(const Residencies& states, const Residency& newcomer, int64_t free_bytes);
  // Before a step: decides what should be where, with hysteresis.
  void Observe(const Residencies& states, int64_t free_bytes);
  // By hand: decides what should be where at once. With `only`, for this state alone.
  void Retarget(const Residencies& states, int64_t free_bytes, const Residency* only = nullptr);
  // The next move of about `most_bytes`; moves out come before moves in. False if there is none.
  bool Next(const Residencies& states, int64_t free_bytes, int64_t most_bytes, Step* step);
  // A step took as long as if it had to fetch pages that should be in the GPU's memory. On a full
  // device the driver may have given their memory to others without a word.
  void NoteSlowStep(const Residencies& states);
  bool is_full() const { return was_full_; }
  // Before a move is made: marks the state, and what the move takes of what the driver holds.
  void Begin(const Residencies& states, const Step& step, int64_t free_bytes);

 private:
  int64_t Room(const Residencies& states, int64_t free_bytes);
  int64_t Capacity(const Residencies& states, int64_t free_bytes);

  SteadyCapacity capacity_;
  bool was_full_ = false;
  bool is_filled_by_us_ = false;
  int64_t robbed_bytes_ = 0;  // that count as resident and probably are not
};

}  // namespace paged_optax
