// See pager.h.
#include "pager.h"

#include <algorithm>
#include <chrono>
#include <exception>
#include <limits>

#include "arena.h"
#include "device_table.h"
#include "memory.h"
#include "notice.h"
#include "preflight.h"
#include "step_cuda.h"

namespace paged_optax {
namespace {

// What moves together: long enough for the link, short enough for a step that waits for it.
constexpr int64_t kBytesPerMove = int64_t{64} << 20;
// What may move for each step.
constexpr int64_t kBytesPerStep = int64_t{128} << 20;
// A device with less free memory than this is full.
constexpr int64_t kFullBytes = int64_t{64} << 20;
constexpr int64_t kNoLimit = std::numeric_limits<int64_t>::max();

Demand DemandOf(const Geometry& geometry, const PlacementPolicy& policy, int64_t limit) {
  const int64_t all = geometry.NumBytes();
  return {limit < 0 ? all : std::min(all, limit), policy.device_bytes};
}

Demand DemandOf(const Arena& arena) {
  return DemandOf(arena.memory->geometry(), arena.policy, arena.residency.limit);
}

// Shares in whole segments. What rounding down leaves over goes, a segment at a time, to the first
// that can have it.
std::vector<int32_t> ShareSegments(const std::vector<Demand>& demands,
                                   const std::vector<Geometry>& geometries, int64_t capacity) {
  const std::vector<int64_t> shares = FairShares(demands, capacity);
  std::vector<int32_t> segments;
  int64_t total = 0;
  for (size_t i = 0; i < shares.size(); ++i) {
    segments.push_back(geometries[i].SegmentsIn(shares[i]));
    total += geometries[i].LeadingBytes(segments[i]);
  }
  for (size_t i = 0; i < shares.size(); ++i) {
    const int64_t budget = demands[i].budget < 0 ? capacity : demands[i].budget;
    while (segments[i] < geometries[i].NumSegments()) {
      const int64_t next = geometries[i].LeadingBytes(segments[i] + 1);
      const int64_t raise = next - geometries[i].LeadingBytes(segments[i]);
      if (next > demands[i].wanted || total + raise > std::min(budget, capacity)) break;
      ++segments[i];
      total += raise;
    }
  }
  return segments;
}

}  // namespace

int64_t Pager::ResidentBytes() const {
  int64_t nbytes = 0;
  for (const auto& arena : table_.arenas) {
    // What is on its way counts as there, so that nothing looks free which is not.
    const Residency& residency = arena->residency;
    const int32_t segments =
        residency.moving ? std::max(residency.segments, residency.moving_to) : residency.segments;
    nbytes += arena->memory->geometry().LeadingBytes(segments);
  }
  return nbytes;
}

// The driver keeps the device memory of managed pages that went to the host, and cudaMemGetInfo
// does not count it as free; but it gives it to whoever calls cudaMalloc when nothing else is left.
// So it is room, until the device has been seen full: after that nobody can tell what is left of
// it.
int64_t Pager::HeldBytes(int64_t free_bytes) {
  int64_t nbytes = 0;
  for (const auto& arena : table_.arenas) {
    Residency& residency = arena->residency;
    const bool keeps = !arena->memory->ChangesAddresses() && free_bytes >= kFullBytes;
    if (!keeps) residency.held = 0;
    residency.held = std::max(residency.held, residency.segments);
    const Geometry& geometry = arena->memory->geometry();
    nbytes += geometry.LeadingBytes(residency.held) - geometry.LeadingBytes(residency.segments);
  }
  return nbytes;
}

int64_t Pager::Room() {
  const int64_t free_bytes = FreeDeviceBytes(table_.ordinal);
  return free_bytes + HeldBytes(free_bytes) - Headroom();
}

int64_t Pager::Headroom() const {
  int64_t headroom = 0;
  for (const auto& arena : table_.arenas) {
    headroom = std::max(headroom, arena->policy.headroom_bytes);
  }
  return headroom;
}

FirstShare Pager::FirstPlacement(const Geometry& geometry, const PlacementPolicy& policy) {
  std::vector<Demand> demands;
  std::vector<Geometry> geometries;
  for (const auto& arena : table_.arenas) {
    demands.push_back(DemandOf(*arena));
    geometries.push_back(arena->memory->geometry());
  }
  demands.push_back(DemandOf(geometry, policy, -1));
  geometries.push_back(geometry);
  const int64_t room = Room() - std::max<int64_t>(0, policy.headroom_bytes - Headroom());
  const int64_t resident = ResidentBytes();
  const int32_t share = ShareSegments(demands, geometries, room + resident).back();
  // Others may have to give up theirs first; the state then grows while it is used.
  const int64_t budget = policy.device_bytes < 0 ? room : policy.device_bytes - resident;
  const int32_t ideal = ShareSegments(demands, geometries, kNoLimit).back();
  return {std::min(share, geometry.SegmentsIn(std::min(room, budget))),
          geometry.LeadingBytes(ideal) - geometry.LeadingBytes(share)};
}

void Pager::SetTargets(int64_t capacity, bool at_once) {
  std::vector<Demand> demands;
  std::vector<Geometry> geometries;
  for (const auto& arena : table_.arenas) {
    demands.push_back(DemandOf(*arena));
    geometries.push_back(arena->memory->geometry());
  }
  const std::vector<int32_t> segments = ShareSegments(demands, geometries, capacity);
  for (size_t i = 0; i < segments.size(); ++i) {
    Residency& residency = table_.arenas[i]->residency;
    const int64_t resident = geometries[i].LeadingBytes(residency.segments);
    const int64_t share = geometries[i].LeadingBytes(segments[i]);
    if (at_once || IsWorthMoving(resident, share, demands[i].wanted)) {
      residency.target = segments[i];
    } else if (residency.target > segments[i]) {
      residency.target = std::max(segments[i], residency.segments);
    }
  }
}

void Pager::BeforeStep(void* stream) {
  if (table_.arenas.empty()) return;
  const auto is_moving = [](const auto& arena) { return arena->residency.moving; };
  // Meanwhile the driver may be slow to say what is free, and it is about to change.
  if (std::none_of(table_.arenas.begin(), table_.arenas.end(), is_moving)) {
    const int64_t capacity = Room() + ResidentBytes();
    SetTargets(capacity_.Observe(capacity), /*at_once=*/false);
  }
  allowance_ = std::max(allowance_, kBytesPerStep);
  Wake();
  if (has_stepped_) {
    CUDA_CHECK(cudaStreamWaitEvent(static_cast<cudaStream_t>(stream), stepped_, 0));
  }
  if (has_moved_) CUDA_CHECK(cudaStreamWaitEvent(static_cast<cudaStream_t>(stream), moved_, 0));
}

void Pager::AfterStep(void* stream) {
  const auto changes = [](const auto& arena) { return arena->memory->ChangesAddresses(); };
  if (std::none_of(table_.arenas.begin(), table_.arenas.end(), changes)) return;
  if (stepped_ == nullptr) {
    CUDA_CHECK(cudaEventCreateWithFlags(&stepped_, cudaEventDisableTiming));
    CUDA_CHECK(cudaEventCreateWithFlags(&moved_, cudaEventDisableTiming));
  }
  CUDA_CHECK(cudaEventRecord(stepped_, static_cast<cudaStream_t>(stream)));
  has_stepped_ = true;
}

int64_t Pager::MoveNow(std::unique_lock<std::mutex>& lock, Arena& arena, int64_t nbytes) {
  AwaitIdle(lock, arena);
  Residency& residency = arena.residency;
  residency.limit = nbytes;
  residency.failed = false;
  failure_.clear();
  const int64_t before = residency.moved_bytes;
  const int64_t capacity = Room() + ResidentBytes();
  SetTargets(capacity, /*at_once=*/true);
  allowance_ = kNoLimit;
  Wake();
  Task task;
  settled_.wait(lock, [&] {
    return stopping_ || !failure_.empty() ||
           (!residency.moving && (residency.segments == residency.target || !Pick(&task)));
  });
  allowance_ = 0;
  if (!failure_.empty()) {
    throw StatusError(StatusCode::kResourceExhausted, "moments could not be moved: " + failure_);
  }
  return residency.moved_bytes - before;
}

void Pager::AwaitIdle(std::unique_lock<std::mutex>& lock, const Arena& arena) {
  settled_.wait(lock, [&] { return !arena.residency.moving; });
}

// The next thing to move: out before in.
bool Pager::Pick(Task* task) {
  if (allowance_ <= 0) return false;
  for (const bool to_device : {false, true}) {
    for (const auto& arena : table_.arenas) {
      const Residency& residency = arena->residency;
      const int32_t wanted =
          to_device ? residency.target - residency.segments : residency.segments - residency.target;
      if (wanted <= 0 || residency.moving || (to_device && residency.failed)) continue;
      const Geometry& geometry = arena->memory->geometry();
      const int64_t one = geometry.SegmentBytes() * geometry.num_slots;
      const auto most = static_cast<int32_t>(std::max<int64_t>(1, kBytesPerMove / one));
      const int32_t count = std::min(wanted, most);
      const int32_t first = to_device ? residency.segments : residency.segments - count;
      if (to_device) {
        const int64_t nbytes = geometry.LeadingBytes(first + count) - geometry.LeadingBytes(first);
        if (nbytes > Room()) continue;
      }
      *task = {arena, first, count, to_device};
      return true;
    }
  }
  return false;
}

void Pager::Wake() {
  const auto is_settled = [](const auto& arena) {
    return arena->residency.segments == arena->residency.target;
  };
  if (stopping_ || std::all_of(table_.arenas.begin(), table_.arenas.end(), is_settled)) return;
  if (!thread_.joinable()) thread_ = std::thread([this] { Run(); });
  wake_.notify_one();
}

void Pager::Run() {
  std::unique_lock<std::mutex> lock(table_.mutex);
  Task task;
  while (!stopping_) {
    if (!Pick(&task)) {
      settled_.notify_all();  // nothing more can be done now
      wake_.wait(lock);
      continue;
    }
    try {
      Execute(lock, task);
    } catch (const std::exception& error) {
      if (!lock.owns_lock()) lock.lock();
      Residency& residency = task.arena->residency;
      residency.failed = task.to_device;
      residency.target = residency.segments;
      residency.moving = false;
      failure_ = error.what();
      PostNotice({table_.ordinal, 0,
                  std::string("moments could not be moved: ") + error.what() +
                      ". They stay where they are until prefetch or evict is called."});
    }
    task.arena.reset();
    settled_.notify_all();
  }
}

void Pager::Execute(std::unique_lock<std::mutex>& lock, const Task& task) {
  Arena& arena = *task.arena;
  Residency& residency = arena.residency;
  Memory& memory = *arena.memory;
  const Geometry& geometry = memory.geometry();
  const Move move{task.first, task.count, task.to_device ? Tier::kDevice : Tier::kHost};
  const int32_t resident = task.to_device ? task.first + task.count : task.first;
  const int64_t nbytes =
      geometry.LeadingBytes(task.first + task.count) - geometry.LeadingBytes(task.first);
  residency.moving = true;
  residency.moving_to = resident;
  lock.unlock();
  const auto start = std::chrono::steady_clock::now();

  ScopedDevice scope(table_.ordinal);
  if (stream_ == nullptr) {
    CUDA_CHECK(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
  }
  memory.Prepare(move, stream_);
  if (!memory.ChangesAddresses()) CUDA_CHECK(cudaStreamSynchronize(stream_));
  lock.lock();
  const bool is_ordered = memory.ChangesAddresses() && has_stepped_;
  if (is_ordered) CUDA_CHECK(cudaStreamWaitEvent(stream_, stepped_, 0));
  memory.Enqueue(move, stream_);
  arena.segments = memory.Table(resident);
  LaunchWriteSegments(arena.segments, arena.header.segments, table_.ordinal, stream_);
  if (is_ordered) {
    CUDA_CHECK(cudaEventRecord(moved_, stream_));
    has_moved_ = true;
  }
  lock.unlock();
  CUDA_CHECK(cudaStreamSynchronize(stream_));
  memory.Finish(move, stream_);
  lock.lock();

  if (is_ordered) has_moved_ = false;
  residency.segments = resident;
  residency.moving = false;
  residency.moved_bytes += nbytes;
  residency.moving_seconds +=
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  if (allowance_ != kNoLimit) allowance_ -= nbytes;
}

void Pager::Stop() {
  {
    std::lock_guard<std::mutex> lock(table_.mutex);
    stopping_ = true;
    wake_.notify_all();
    settled_.notify_all();
  }
  if (thread_.joinable()) thread_.join();
}

}  // namespace paged_optax
