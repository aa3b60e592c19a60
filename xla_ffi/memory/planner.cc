// See planner.h.
#include "memory/planner.h"

namespace paged_optax {
namespace {

// A device with less free memory than this is full.
constexpr int64_t kFullBytes = int64_t{64} << 20;

int64_t Bytes(const Residency& state, int32_t segments) {
  return state.geometry.LeadingBytes(segments);
}

Demand DemandOf(const Residency& state) {
  const int64_t all = state.geometry.NumBytes();
  return {state.limit < 0 ? all : std::min(all, state.limit), state.device_bytes};
}

int64_t Headroom(const Residencies& states) {
  int64_t headroom = 0;
  for (const Residency* state : states) headroom = std::max(headroom, state->headroom_bytes);
  return headroom;
}

// Segments on their way count as resident, so that their memory does not look free.
int64_t ResidentBytes(const Residencies& states) {
  int64_t nbytes = 0;
  for (const Residency* state : states) {
    nbytes += Bytes(*state,
                    state->moving ? std::max(state->segments, state->moving_to) : state->segments);
  }
  return nbytes;
}

// Shares in whole segments. What is left over from rounding down goes to the first state that can
// have it, a segment at a time.
std::vector<int32_t> ShareSegments(const Residencies& states, int64_t capacity) {
  std::vector<Demand> demands;
  for (const Residency* state : states) demands.push_back(DemandOf(*state));
  const std::vector<int64_t> shares = FairShares(demands, capacity);
  std::vector<int32_t> segments;
  int64_t total = 0;
  for (size_t i = 0; i < shares.size(); ++i) {
    segments.push_back(states[i]->geometry.SegmentsIn(shares[i]));
    total += Bytes(*states[i], segments[i]);
  }
  for (size_t i = 0; i < shares.size(); ++i) {
    const int64_t budget = demands[i].budget < 0 ? capacity : demands[i].budget;
    while (segments[i] < states[i]->geometry.NumSegments()) {
      const int64_t next = Bytes(*states[i], segments[i] + 1);
      const int64_t raise = next - Bytes(*states[i], segments[i]);
      if (next > demands[i].wanted || total + raise > std::min(budget, capacity)) break;
      ++segments[i];
      total += raise;
    }
  }
  return segments;
}

}  // namespace

std::vector<int64_t> FairShares(const std::vector<Demand>& demands, int64_t capacity) {
  std::vector<int64_t> shares(demands.size(), 0);
  std::vector<size_t> growing;
  for (size_t i = 0; i < demands.size(); ++i) growing.push_back(i);
  int64_t total = 0;
  const auto limit = [&](size_t i) {
    const int64_t budget = demands[i].budget < 0 ? kNoLimit : demands[i].budget;
    return std::min(budget, capacity);
  };
  for (;;) {
    growing.erase(std::remove_if(growing.begin(), growing.end(),
                                 [&](size_t i) {
                                   return shares[i] >= demands[i].wanted || total >= limit(i);
                                 }),
                  growing.end());
    if (growing.empty()) return shares;
    int64_t raise = kNoLimit, room = kNoLimit;
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

// How many more bytes of device memory moments may take; negative: how many they should give up.
//
// The driver keeps the device memory of managed pages that went to the host and does not report it
// as free, but it gives it to the next cudaMalloc that finds nothing else. So it counts as room.
// When somebody else fills the device, nobody can tell how much of this memory went: all of it is
// forgotten then, once. What is given up after that is known again.
int64_t Planner::Room(const Residencies& states, int64_t free_bytes) {
  const bool is_full = free_bytes < kFullBytes;
  const bool forget = is_full && !was_full_ && !is_filled_by_us_;
  was_full_ = is_full;
  if (!is_full) {
    is_filled_by_us_ = false;
    robbed_bytes_ = 0;
  }
  int64_t held = 0;
  for (Residency* state : states) {
    if (!state->is_kept || forget) state->held = 0;
    state->held = std::max(state->held, state->segments);
    held += Bytes(*state, state->held) - Bytes(*state, state->segments);
  }
  return free_bytes + held - robbed_bytes_ - Headroom(states);
}

void Planner::NoteSlowStep(const Residencies& states) {
  if (!was_full_) return;
  robbed_bytes_ += std::max(ResidentBytes(states) / 4, kFullBytes);
}

int64_t Planner::Capacity(const Residencies& states, int64_t free_bytes) {
  return Room(states, free_bytes) + ResidentBytes(states);
}

FirstShare Planner::Place(const Residencies& states, const Residency& newcomer,
                          int64_t free_bytes) {
  if (states.empty()) capacity_ = {};  // the states that it was observed for are gone
  const int64_t room =
      Room(states, free_bytes) - std::max<int64_t>(0, newcomer.headroom_bytes - Headroom(states));
  const int64_t resident = ResidentBytes(states);
  Residency copy = newcomer;
  Residencies all = states;
  all.push_back(&copy);
  const int32_t share = ShareSegments(all, room + resident).back();
  // Others may have to give up some of theirs first; the state then grows while it is used.
  const int64_t budget = newcomer.device_bytes < 0 ? room : newcomer.device_bytes - resident;
  const int32_t ideal = ShareSegments(all, kNoLimit).back();
  return {std::min(share, newcomer.geometry.SegmentsIn(std::min(room, budget))),
          Bytes(newcomer, ideal) - Bytes(newcomer, share)};
}

void Planner::Observe(const Residencies& states, int64_t free_bytes) {
  const int64_t capacity = capacity_.Observe(Capacity(states, free_bytes));
  const std::vector<int32_t> shares = ShareSegments(states, capacity);
  for (size_t i = 0; i < states.size(); ++i) {
    Residency& state = *states[i];
    if (!state.failure.empty()) continue;
    const int64_t resident = Bytes(state, state.segments), share = Bytes(state, shares[i]);
    if (IsWorthMoving(resident, share, DemandOf(state).wanted)) {
      state.target = shares[i];
    } else {
      // Go on with the last decision as far as it still makes sense.
      state.target = std::clamp(state.target, state.segments, std::max(shares[i], state.segments));
    }
  }
}

void Planner::Retarget(const Residencies& states, int64_t free_bytes, const Residency* only) {
  const int64_t capacity = Capacity(states, free_bytes);
  capacity_ = {};  // earlier observations must not undo this
  capacity_.Observe(capacity);
  const std::vector<int32_t> shares = ShareSegments(states, capacity);
  for (size_t i = 0; i < states.size(); ++i) {
    if (only == nullptr || only == states[i]) states[i]->target = shares[i];
  }
}

bool Planner::Next(const Residencies& states, int64_t free_bytes, int64_t most_bytes, Step* step) {
  for (const bool is_in : {false, true}) {
    for (size_t i = 0; i < states.size(); ++i) {
      const Residency& state = *states[i];
      const int32_t wanted = is_in ? state.target - state.segments : state.segments - state.target;
      if (wanted <= 0 || state.moving || !state.failure.empty()) continue;
      const int64_t one = state.geometry.SegmentBytes() * state.geometry.num_slots;
      const auto most = static_cast<int32_t>(std::max<int64_t>(1, most_bytes / one));
      const int32_t count = std::min(wanted, most);
      const int32_t segments = is_in ? state.segments + count : state.segments - count;
      if (is_in &&
          Bytes(state, segments) - Bytes(state, state.segments) > Room(states, free_bytes)) {
        continue;
      }
      *step = {i, segments};
      return true;
    }
  }
  return false;
}

void Planner::Begin(const Residencies& states, const Step& step, int64_t free_bytes) {
  Residency& state = *states[step.state];
  state.moving = true;
  state.moving_to = step.segments;
  // The driver first uses what it holds for this state, then what is free, then what it holds for
  // other states.
  const int64_t taken =
      Bytes(state, step.segments) - Bytes(state, std::max(state.held, state.segments));
  if (taken <= 0) return;
  if (free_bytes - taken < kFullBytes) is_filled_by_us_ = true;
  int64_t missing = taken - free_bytes;
  for (Residency* other : states) {
    while (other != &state && missing > 0 && other->held > other->segments) {
      missing -= Bytes(*other, other->held) - Bytes(*other, other->held - 1);
      --other->held;
    }
  }
}

}  // namespace paged_optax
