// See pager.h.
#include "state/pager.h"

#include <algorithm>
#include <chrono>
#include <exception>
#include <stdexcept>

#include "base/faults.h"
#include "base/notice.h"
#include "base/status.h"
#include "base/trace.h"
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

FirstShare Pager::BeginPlacement(const ContentsLock& lock, const Residency& newcomer) {
  const FirstShare share = planner_.Place(States(lock), newcomer, FreeDeviceBytes(ordinal_));
  is_placing_ = true;
  return share;
}

void Pager::EndPlacement(const ContentsLock& lock) {
  is_placing_ = false;
  Wake(lock);
  settled_.notify_all();
}

void Pager::CheckBooks(const ContentsLock&) const {
  if (broken_.empty()) return;
  throw StatusError(StatusCode::kFailedPrecondition,
                    "paged_optax: the moments on GPU " + std::to_string(ordinal_) +
                        " cannot be trusted any more, because CUDA failed while some of them "
                        "moved: " +
                        broken_ + ". Start the process anew.");
}

void Pager::MakeEvents() {
  if (stepped_ != nullptr) return;
  ScopedDevice scope(ordinal_);
  if (moved_ == nullptr) CUDA_CHECK(cudaEventCreateWithFlags(&moved_, cudaEventDisableTiming));
  CUDA_CHECK(cudaEventCreateWithFlags(&stepped_, cudaEventDisableTiming));
}

// On a full device, how long the last step took. Never waits for it.
void Pager::TakeTime(const Residencies& states) {
  if (timing_ != Timing::kEnded || PAGED_CUDA(cudaEventQuery(ended_)) != cudaSuccess) return;
  timing_ = Timing::kNone;
  float ms = 0.0f;
  CUDA_CHECK(cudaEventElapsedTime(&ms, began_, ended_));
  if (ms > PatienceMs(states)) planner_.NoteSlowStep(states);
}

// What should be where, and whether this step's time is taken.
void Pager::Plan(const ContentsLock& lock) {
  const Residencies states = States(lock);
  // While something moves, the driver may be slow to say what is free, and it is about to change.
  const auto is_moving = [](const Residency* state) { return state->moving; };
  if (is_placing_ || std::any_of(states.begin(), states.end(), is_moving)) return;
  TakeTime(states);
  planner_.Observe(states, FreeDeviceBytes(ordinal_));
}

void Pager::BeforeStep(const ContentsLock& lock, Stream stream) {
  if (arenas_.empty()) return;
  try {
    Plan(lock);
  } catch (const CudaError&) {  // a step needs no plan
  }
  allowance_ = std::min(allowance_ + kBytesPerStep, kBytesPerStep);
  Wake(lock);
  BeforePart(lock, stream);
  if (!planner_.is_full() || timing_ != Timing::kNone) return;
  try {
    if (began_ == nullptr) {
      ScopedDevice scope(ordinal_);
      if (ended_ == nullptr) CUDA_CHECK(cudaEventCreate(&ended_));
      CUDA_CHECK(cudaEventCreate(&began_));
    }
    CUDA_CHECK(cudaEventRecord(began_, stream));
    timing_ = Timing::kBegun;
  } catch (const CudaError&) {  // nor does its time have to be known
  }
}

void Pager::BeforePart(const ContentsLock&, Stream stream) {
  if (has_stepped_) CUDA_CHECK(cudaStreamWaitEvent(stream, stepped_, 0));
  if (has_moved_) CUDA_CHECK(cudaStreamWaitEvent(stream, moved_, 0));
}

// The step is launched. Nothing here may make it fail.
void Pager::AfterStep(const ContentsLock&, Stream stream) {
  if (timing_ == Timing::kBegun) {
    const bool is_recorded = PAGED_CUDA(cudaEventRecord(ended_, stream)) == cudaSuccess;
    timing_ = is_recorded ? Timing::kEnded : Timing::kNone;
  }
  const auto changes = [](const auto& arena) { return arena->memory->ChangesAddresses(); };
  if (std::none_of(arenas_.begin(), arenas_.end(), changes)) return;
  try {
    MakeEvents();
    CUDA_CHECK(cudaEventRecord(stepped_, stream));
    has_stepped_ = true;
  } catch (const CudaError&) {
    CUDA_CHECK(cudaStreamSynchronize(stream));  // then moves need not wait for it
    has_stepped_ = false;
  }
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
  const DeviceId device{Platform::kCuda, ordinal_};
  for (bool is_held = true; is_held;) {
    is_held = false;
    Step step;
    lock.Await(settled_, [&] {
      if (is_placing_) return false;
      if (stopping_ || !residency.failure.empty()) return true;
      if (residency.moving) return false;
      if (residency.segments == residency.target) return true;
      is_held = holds_.any(device);
      if (is_held || !Next(lock, &step)) return true;
      wake_.notify_one();  // the thread may sleep because it found no room, which came since
      return false;
    });
    if (is_held) holds_.AwaitNone(lock, device);  // nothing moves while somebody reads
  }
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
  if (is_placing_ || holds_.any({Platform::kCuda, ordinal_})) return false;
  if (urgent_ == 0 && allowance_ <= 0) return false;
  return Next(lock, step);
}

bool Pager::Next(const ContentsLock& lock, Step* step) {
  return planner_.Next(States(lock), FreeDeviceBytes(ordinal_), kBytesPerMove, step);
}

void Pager::Wake(const ContentsLock& lock) {
  const auto is_settled = [](const auto& arena) {
    return arena->residency.segments == arena->residency.target;
  };
  if (stopping_ || std::all_of(arenas_.begin(), arenas_.end(), is_settled)) return;
  if (!thread_.joinable()) Start(lock);
  wake_.notify_one();
}

// A machine without a thread to spare moves nothing; steps run all the same.
void Pager::Start(const ContentsLock& lock) {
  try {
    if (PAGED_FAILS("thread")) throw std::runtime_error("as a test wants it");
    thread_ = std::thread([this] { Run(); });
  } catch (const std::exception& error) {
    const std::string what = std::string("no thread could be started for it: ") + error.what();
    for (const auto& arena : arenas_) Fail(lock, *arena, what.c_str());
  }
}

void Pager::Run() {
  ContentsLock lock(mutex_);
  // For good: in a thread without a device, a ScopedDevice would go back to GPU 0, and with that
  // make a context there.
  (void)PAGED_CUDA(cudaSetDevice(ordinal_));
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
void Pager::Enqueue(const ContentsLock& lock, Arena& arena, const Move& move, int32_t segments) {
  Memory& memory = *arena.memory;
  if (memory.ChangesAddresses()) {
    MakeEvents();
    if (has_stepped_) CUDA_CHECK(cudaStreamWaitEvent(stream_, stepped_, 0));
  }
  memory.Enqueue(move, stream_);
  memory.Publish(move);
  const SegmentTable table = memory.Table(segments);
  try {
    LaunchWriteSegments(table, arena.header.segments, ordinal_, stream_);
  } catch (...) {  // the device still sees everything where it was
    memory.Publish(
        {move.first, move.count, move.to == Tier::kDevice ? Tier::kHost : Tier::kDevice});
    throw;
  }
  // From here on the books say what the device will see, whatever happens.
  arena.segments = table;
  arena.residency.segments = segments;
  if (memory.ChangesAddresses()) RecordMove(lock);
}

// Steps wait for the move. If they cannot, it is over before the next one.
void Pager::RecordMove(const ContentsLock&) {
  if (PAGED_CUDA(cudaEventRecord(moved_, stream_)) == cudaSuccess) {
    has_moved_ = true;
    return;
  }
  try {
    CUDA_CHECK(cudaStreamSynchronize(stream_));
  } catch (const CudaError& error) {
    broken_ = error.what();
    throw;
  }
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
  const TraceRange range(is_in ? "paged_optax: moments to the GPU"
                               : "paged_optax: moments to the host");
  planner_.Begin(States(lock), step, FreeDeviceBytes(ordinal_));
  const auto start = std::chrono::steady_clock::now();
  {
    const ContentsLock::Pause pause(lock);
    if (stream_ == nullptr) {
      const ScopedDevice scope(ordinal_);  // whatever became of this thread's own
      CUDA_CHECK(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    }
    memory.Prepare(move, stream_);
    if (!memory.ChangesAddresses()) CUDA_CHECK(cudaStreamSynchronize(stream_));
  }
  try {
    Enqueue(lock, arena, move, segments);
  } catch (...) {
    if (residency.segments != segments) memory.Abandon(move, stream_);
    throw;
  }
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
