// How much of each state's moments may be in a GPU's memory: pure arithmetic, without CUDA. Used by
// pager.cc, and by module.cc for the tests.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <vector>

namespace paged_optax {

// What a state asks for.
struct Demand {
  int64_t wanted;  // bytes that it would take
  int64_t budget;  // takes no more once the states together have this many; negative: no budget
};

// Shares of `capacity` bytes, max-min fair: all grow alike, until they have what they want, meet
// their budget or nothing is left. (D. Bertsekas, R. Gallager, "Data Networks", 2nd edition, 1992,
// section 6.5.2.)
inline std::vector<int64_t> FairShares(const std::vector<Demand>& demands, int64_t capacity) {
  constexpr int64_t kNone = std::numeric_limits<int64_t>::max();
  std::vector<int64_t> shares(demands.size(), 0);
  std::vector<size_t> growing;
  for (size_t i = 0; i < demands.size(); ++i) growing.push_back(i);
  int64_t total = 0;
  const auto limit = [&](size_t i) {
    const int64_t budget = demands[i].budget < 0 ? kNone : demands[i].budget;
    return std::min(budget, capacity);
  };
  for (;;) {
    growing.erase(std::remove_if(growing.begin(), growing.end(),
                                 [&](size_t i) {
                                   return shares[i] >= demands[i].wanted || total >= limit(i);
                                 }),
                  growing.end());
    if (growing.empty()) return shares;
    int64_t raise = kNone, room = kNone;
    for (const size_t i : growing) {
      raise = std::min(raise, demands[i].wanted - shares[i]);
      room = std::min(room, limit(i) - total);
    }
    raise = std::min(raise, room / static_cast<int64_t>(growing.size()));
    if (raise > 0) {
      for (const size_t i : growing) shares[i] += raise;
      total += raise * static_cast<int64_t>(growing.size());
    } else {  // fewer bytes than states: one each for the first of them
      for (int64_t i = 0; i < room; ++i) ++shares[growing[i]];
      total += room;
    }
  }
}

// What moments may take of a GPU's memory, seen with hysteresis: when it shrinks that counts at
// once, and when it grows only once it has lasted for kSteps steps.
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

// A change of a state's resident bytes that is worth making: shrinking always is, growing from a
// sixteenth of the state on, or to all that it wants. Between what makes a state shrink and what
// makes it grow lies that much.
inline bool IsWorthMoving(int64_t resident, int64_t share, int64_t wanted) {
  if (share <= resident) return share < resident;
  return share >= wanted || share - resident >= wanted / 16;
}

}  // namespace paged_optax
