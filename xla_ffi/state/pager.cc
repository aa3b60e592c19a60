// See pager.h.
#include "state/pager.h"

#include <algorithm>
#include <chrono>
#include <exception>

#include "base/notice.h"
#include "base/status.h"
#include "memory/gpus.h"
#include "memory/memory.h"
#include "step/step_cuda.h"

namespace paged_optax {
namespace {

// What moves together: long enough for the link, short enough for a step that waits for it.
constexpr int64_t kBytesPerMove = int64_t{64} << 20;
// What may move for each step.
constexpr int64_t kBytesPerStep = int64_t{128} << 20;

// The longest that a step should take: a tenth of what GPUs and links since PCIe 4 reach, and a
// constant for small ones.
double PatienceMs(const Residencies& states) {
  double ms = 5.0;
  for (const Residency* state : states) {
    const auto resident = static_cast<double>(state->geometry.LeadingBytes(state->segments));
    const auto all = static_cast<double>(state->geometry.NumBytes());
    ms += resident / 1e8 + (all - resident) / 2e7;
  }
  return ms;
}

}  // namespace

Residencies Pager::States(const ContentsLock&) const {
  Residencies states;
  for (const auto& arena : arenas_) states.push_back(&arena->residency);
  return states;
}

FirstShare Pager::FirstPlacement(const ContentsLock& lock, const Residency& newcomer) {
  return planner_.Place(States(lock), newcomer, FreeDeviceBytes(ordinal_));
}

void Pager::MakeEvents() {
  if (stepped_ != nullptr) return;
  ScopedDevice scope(ordinal_);
  CUDA_CHECK(cudaEventCreateWithFlags(&moved_, cudaEventDisableTiming));
  CUDA_CHECK(cudaEventCreateWithFlags(&stepped_, cudaEventDisableTiming));
}

// On a full device, how long the last step took. Never waits for it.
void Pager::TakeTime(const Residencies& states) {
  if (timing_ != Timing::kEnded || cudaEventQuery(ended_) != cudaSuccess) return;
  timing_ = Timing::kNone;
  float ms = 0.0f;
  CUDA_CHECK(cudaEventElapsedTime(&ms, began_, ended_));
  if (ms > PatienceMs(states)) planner_.NoteSlowStep(states);
}

void Pager::BeforeStep(const ContentsLock& lock, Stream stream) {
  const Residencies states = States(lock);
  if (states.empty()) return;
  // While something moves, the driver may be slow to say what is free, and it is about to change.
  if (std::none_of(states.begin(), states.end(), [](const Residency* s) { return s->moving; })) {
    TakeTime(states);
    planner_.Observe(states, FreeDeviceBytes(ordinal_));
  }
  allowance_ = std::min(allowance_ + kBytesPerStep, kBytesPerStep);
  Wake(lock);
  if (has_stepped_) CUDA_CHECK(cudaStreamWaitEvent(stream, stepped_, 0));
  if (has_moved_) CUDA_CHECK(cudaStreamWaitEvent(stream, moved_, 0));
  if (!planner_.is_full() || timing_ != Timing::kNone) return;
  if (began_ == nullptr) {
    ScopedDevice scope(ordinal_);
    CUDA_CHECK(cudaEventCreate(&ended_));
    CUDA_CHECK(cudaEventCreate(&began_));
  }
  CUDA_CHECK(cudaEventRecord(began_, stream));
  timing_ = Timing::kBegun;
}

void Pager::AfterStep(const ContentsLock&, Stream stream) {
  if (timing_ == Timing::kBegun) {
    CUDA_CHECK(cudaEventRecord(ended_, stream));
    timing_ = Timing::kEnded;
  }
  const auto changes = [](const auto& arena) { return arena->memory->ChangesAddresses(); };
  if (std::none_of(arenas_.begin(), arenas_.end(), changes)) return;
  MakeEvents();
  CUDA_CHECK(cudaEventRecord(stepped_, stream));
  has_stepped_ = true;
}

int64_t Pager::MoveNow(ContentsLock& lock, Arena& arena, int64_t nbytes) {
  AwaitIdle(lock, arena);
  Residency& residency = arena.residency;
  residency.limit = nbytes;
  residency.failure.clear();
  const int64_t before = residency.moved_bytes;
  // What one state gives up is for somebody else, and not for the others.
  planner_.Retarget(States(lock), FreeDeviceBytes(ordinal_), nbytes < 0 ? nullptr : &residency);
  struct Urgency {
    int& count;
    explicit Urgency(int& count) : count(count) { ++count; }
    ~Urgency() { --count; }
  } urgency(urgent_);
  Wake(lock);
  Step step;
  lock.Await(settled_, [&] {
    if (stopping_ || !residency.failure.empty()) return true;
    return !residency.moving && (residency.segments == residency.target || !Pick(lock, &step));
  });
  if (!residency.failure.empty()) {
    throw StatusError(StatusCode::kResourceExhausted,
                      "moments could not be moved: " + residency.failure);
  }
  return residency.moved_bytes - before;
}

void Pager::AwaitIdle(ContentsLock& lock, const Arena& arena) {
  lock.Await(settled_, [&] { return !arena.residency.moving; });
}

bool Pager::Pick(const ContentsLock& lock, Step* step) {
  if (holds_.any(lock) || (urgent_ == 0 && allowance_ <= 0)) return false;
  return planner_.Next(States(lock), FreeDeviceBytes(ordinal_), kBytesPerMove, step);
}

void Pager::Wake(const ContentsLock&) {
  const auto is_settled = [](const auto& arena) {
    return arena->residency.segments == arena->residency.target;
  };
  if (stopping_ || std::all_of(arenas_.begin(), arenas_.end(), is_settled)) return;
  if (!thread_.joinable()) thread_ = std::thread([this] { Run(); });
  wake_.notify_one();
}

void Pager::Run() {
  ContentsLock lock(mutex_);
  // For good: in a thread without a device, a ScopedDevice would go back to GPU 0, and with that
  // make a context there.
  (void)cudaSetDevice(ordinal_);
  while (!stopping_) {
    std::shared_ptr<Arena> arena;
    try {
      Step step;
      if (Pick(lock, &step)) {
        arena = arenas_[step.state];
        Execute(lock, *arena, step);
      }
    } catch (const std::exception& error) {
      if (arena != nullptr) {
        Fail(lock, *arena, error.what());
      } else {
        for (const auto& each : arenas_) Fail(lock, *each, error.what());
      }
    }
    settled_.notify_all();
    if (arena == nullptr) lock.Await(wake_);
  }
}

void Pager::Fail(const ContentsLock&, Arena& arena, const char* what) {
  Residency& residency = arena.residency;
  residency.failure = what;
  residency.target = residency.segments;
  residency.moving = false;
  if (has_complained_) return;
  has_complained_ = true;
  PostNotice({ordinal_, 0,
              std::string("moments could not be moved: ") + what +
                  ". They stay where they are until prefetch or evict is called."});
}

// After a move was prepared: has the device make it between two steps, and know about it.
void Pager::Enqueue(const ContentsLock&, Arena& arena, const Move& move, int32_t segments) {
  Memory& memory = *arena.memory;
  if (memory.ChangesAddresses()) {
    MakeEvents();
    if (has_stepped_) CUDA_CHECK(cudaStreamWaitEvent(stream_, stepped_, 0));
  }
  memory.Enqueue(move, stream_);
  // From here on the books say what the device will see, whatever happens.
  arena.segments = memory.Table(segments);
  arena.residency.segments = segments;
  LaunchWriteSegments(arena.segments, arena.header.segments, ordinal_, stream_);
  if (!memory.ChangesAddresses()) return;
  CUDA_CHECK(cudaEventRecord(moved_, stream_));
  has_moved_ = true;
}

// The lock is given up while the driver works; it is held again when this returns or throws.
void Pager::Execute(ContentsLock& lock, Arena& arena, const Step& step) {
  Residency& residency = arena.residency;
  Memory& memory = *arena.memory;
  const int32_t segments = step.segments;
  const bool is_in = segments > residency.segments;
  const Move move{std::min(segments, residency.segments), std::abs(segments - residency.segments),
                  is_in ? Tier::kDevice : Tier::kHost};
  const int64_t nbytes = residency.geometry.LeadingBytes(move.first + move.count) -
                         residency.geometry.LeadingBytes(move.first);
  planner_.Begin(States(lock), step, FreeDeviceBytes(ordinal_));
  const auto start = std::chrono::steady_clock::now();
  {
    const ContentsLock::Pause pause(lock);
    if (stream_ == nullptr) {
      CUDA_CHECK(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    }
    memory.Prepare(move, stream_);
    if (!memory.ChangesAddresses()) CUDA_CHECK(cudaStreamSynchronize(stream_));
  }
  Enqueue(lock, arena, move, segments);
  {
    const ContentsLock::Pause pause(lock);
    CUDA_CHECK(cudaStreamSynchronize(stream_));
    memory.Finish(move, stream_);
  }
  has_moved_ = false;
  residency.moving = false;
  residency.moved_bytes += nbytes;
  residency.moving_seconds +=
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  if (urgent_ == 0) allowance_ -= nbytes;
}

void Pager::Stop() {
  {
    const ContentsLock lock(mutex_);
    stopping_ = true;
    wake_.notify_all();
    settled_.notify_all();
  }
  if (thread_.joinable()) thread_.join();
}

}  // namespace paged_optax
