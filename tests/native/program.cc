// Drives the registry, both kinds of devices and the pager without XLA, Python or a GPU:
//   program threads SECONDS   from many threads at once, for ThreadSanitizer
//   program handles           what devices and jobs agree on
//   program faults            a run in which each call of the system or of CUDA fails once, in turn
//   program files             the same for arrays that are saved and loaded
//   program room              moments that come back while others take the device's memory
//   program unknown           tokens that name no state
//   program collectives       refused steps of two GPUs that wait for each other, and questions
//   program saves             snapshots of states of two GPUs, whose steps wait for each other
// Ends with an error if moments are lost or memory is kept. What is refused is no error.
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string_view>
#include <thread>

#include "base/faults.h"
#include "base/notice.h"
#include "base/status.h"
#include "fake_step.h"
#include "files.h"
#include "formats/formats.h"
#include "memory/promises.h"
#include "rules/rules.h"
#include "state/cpu_device.h"
#include "state/cuda_device.h"
#include "state/registry.h"
#include "state/source.h"
#include "step/step_cuda.h"

namespace paged_optax {

void PostNotice(Notice) {}

namespace {

constexpr int8_t FormatNamed(std::string_view name) {
  int8_t format = 0;
  while (kFormats[format].name != name) ++format;
  return format;
}

constexpr int8_t kRatio = FormatNamed("ratio");
std::atomic<int64_t> g_next_run{1};

// One state on one or two devices, as a program steps it.
struct State {
  std::vector<DeviceId> devices;
  PlacementPolicy policy;
  Signature signature;
  Token token;
  bool has_parts() const { return signature.rule() == kArrayRule; }  // a step is several calls
};

constexpr int8_t kAdam = 0;
constexpr int64_t kDims[] = {1030, 1024};  // 2.1 MiB: two segments

State MakeState(std::vector<DeviceId> devices, PlacementPolicy policy, int32_t num_slots,
                bool is_restored, int8_t rule = kAdam) {
  Handles& handles = Registry::Get().handles();
  Signature signature(rule, /*paths=*/0, num_slots, static_cast<int64_t>(devices.size()), "");
  signature.Append(kRatio, kDims, 2);
  State state{devices, policy, signature, {0, 0}};
  if (is_restored) {
    auto source = std::make_shared<Source>();
    source->local_devices = static_cast<int64_t>(devices.size());
    state.token = {handles.Stage(source, false), 1};
  } else {
    const int64_t run = g_next_run++;
    for (const DeviceId device : devices)
      state.token.handle = handles.Issue(device, run, {0}, false);
  }
  return state;
}

Request RequestOf(const State& state, DeviceId device, int64_t run) {
  return {device, run, 0, "", state.policy, &state.signature, state.signature.Fingerprint(), 0};
}

// What StoreCpu in xla/arrays.cc does.
Token EndOnCpu(const State& state, DeviceId device, Token open) {
  CpuDevice& cpu = Registry::Get().At<CpuDevice>(device.ordinal);
  const auto locked = cpu.TakeContents(open.handle);
  const int32_t slot = locked ? FindOpenSlot(&locked->arena->header, open) : -1;
  if (slot < 0) throw StatusError(StatusCode::kFailedPrecondition, "lost");
  Arena& arena = *locked->arena;
  const int32_t from = FindOpenSource(arena.header, slot);
  const auto& bases = arena.segments.bases;
  StepBytes(from < 0 ? nullptr : bases[from][0], bases[slot][0],
            arena.memory->geometry().slot_bytes, Pattern(open.handle, state.token.version),
            Pattern(open.handle, -open.version));
  return Close(&arena.header, slot);
}

enum class Until { kBegun, kEnd };

Token StepOnCpu(const State& state, DeviceId device, int64_t run, Until until) {
  std::optional<LockedArena> locked =
      Registry::Get().Open(RequestOf(state, device, run), state.token);
  Arena& arena = *locked->arena;
  const Judgement judgement =
      Judge(&arena.header, state.token, LayoutOf(state.signature.Fingerprint(), 0));
  if (!IsAccepted(judgement.verdict))
    throw StatusError(StatusCode::kFailedPrecondition, "not the newest");
  if (state.has_parts()) {
    const Token open = Open(&arena.header, judgement, /*count=*/0);
    locked.reset();
    return until == Until::kBegun ? state.token : EndOnCpu(state, device, open);
  }
  const auto& bases = arena.segments.bases;
  const Token next = Advance(&arena.header, judgement, /*count=*/0);
  StepBytes(judgement.verdict == Verdict::kFresh ? nullptr : bases[judgement.source][0],
            bases[judgement.target][0], arena.memory->geometry().slot_bytes,
            Pattern(next.handle, state.token.version), Pattern(next.handle, next.version));
  return next;
}

// What StoreCuda in xla/arrays.cc does.
Token EndOnGpu(CudaDevice& gpu, const CudaUpdate& update, Token open) {
  ContentsLock lock = gpu.Acquire();
  gpu.AwaitHolds(lock, &open, nullptr);
  Token next = open;
  CudaUpdate rest = update;
  rest.headers = gpu.headers(lock);
  rest.num_headers = gpu.num_headers(lock);
  rest.new_token = &next;
  gpu.LaunchPart(lock, nullptr, [&] { LaunchRest(rest); });
  if (next.version < 0) throw StatusError(StatusCode::kFailedPrecondition, "lost");
  return next;
}

// What UpdateCuda in xla/handlers.cc does.
Token StepOnGpu(const State& state, DeviceId device, int64_t run, Until until) {
  Registry& registry = Registry::Get();
  CudaDevice& gpu = registry.At<CudaDevice>(device.ordinal);
  fake_cuda::device = device.ordinal;
  registry.CollectReports();
  registry.handles().NoteCall();
  std::shared_ptr<const Source> source;
  std::shared_ptr<Arena> made;
  const Token token = state.token;
  Token next = token;
  const int32_t part = 0;
  const uint64_t fingerprint = state.signature.Fingerprint();
  CudaUpdate update{};
  std::optional<ContentsLock> held(gpu.Acquire());
  ContentsLock& lock = *held;
  if (gpu.MayBeFirstUse(lock, registry.handles(), run, fingerprint)) {
    if (fake_cuda::on_wait != nullptr) fake_cuda::on_wait(device.ordinal);  // to read the token
    Request request = RequestOf(state, device, run);
    if (token.version == 1) request.source = source = registry.handles().SourceOf(token.handle);
    made = gpu.BindOnFirstUse(lock, registry.handles(), request, token, nullptr);
  }
  try {
    gpu.AwaitHolds(lock, &token, nullptr);
    update.headers = gpu.headers(lock);
    update.num_headers = gpu.num_headers(lock);
    update.reports = gpu.device_reports();
    update.token = &token;
    update.part = &part;
    update.new_token = &next;
    update.fingerprint = fingerprint;
    update.kind.output = state.has_parts() ? Output::kOpen : Output::kDirection;
    const Extent extent = state.signature.MakeExtent();
    for (size_t i = 0; i < kFormats.size(); ++i) update.regions[i].region = extent.regions[i];
    gpu.LaunchStep(lock, nullptr, [&] { LaunchUpdate(update, device.ordinal, nullptr); });
  } catch (const std::exception& error) {
    if (made) registry.handles().UndoFirstUse(token.handle, run, error);
    throw;
  }
  if (made) gpu.EndFirstUse(registry.handles(), *made, source != nullptr, nullptr);
  if (next.version >= 0) return next;
  held.reset();
  return until == Until::kBegun ? token : EndOnGpu(gpu, update, next);
}

// Of a step that was refused on one device and not on the other. Right after another thread
// released the state, or if the step before, which was not the first one, failed on one of them.
class Disagreement : public StatusError {
 public:
  Disagreement() : StatusError(StatusCode::kFailedPrecondition, "the devices disagree") {}
};

// One program on all devices of a state, each on a thread of its own if there are two.
void Step(State& state, Until until = Until::kEnd) {
  Registry::Get().ThrowIfRefused(state.token.handle);  // as Python does it before a program runs
  const int64_t run = g_next_run++;
  std::vector<Token> tokens(state.devices.size(), state.token);
  std::vector<std::exception_ptr> failures(state.devices.size());
  const auto step = [&](size_t i) {
    try {
      const auto on = state.devices[i].platform == Platform::kCpu ? StepOnCpu : StepOnGpu;
      tokens[i] = on(state, state.devices[i], run, until);
    } catch (const StatusError&) {
      failures[i] = std::current_exception();
    }
  };
  std::vector<std::thread> threads;
  for (size_t i = 1; i < tokens.size(); ++i) threads.emplace_back(step, i);
  step(0);
  for (std::thread& thread : threads) thread.join();
  for (const auto& failure : failures) {
    if (failure != nullptr) std::rethrow_exception(failure);
  }
  for (const Token& token : tokens) {
    if (token.version != tokens[0].version) throw Disagreement();
  }
  state.token = tokens[0];
}

void CheckSlot(const Arena& arena, int32_t slot, Token token) {
  uint8_t sample[kSample];
  const int64_t nbytes = arena.memory->geometry().slot_bytes;
  for (int64_t at = 0; at + kSample <= nbytes; at += kStride) {
    arena.memory->Read(slot, at, kSample, sample);
    Check("read", sample, Pattern(token.handle, token.version));
  }
}

void Read(const State& state) {
  if (state.token.version == 0) return;
  for (const DeviceId device : state.devices) {
    const Registry::OpenSlot open = Registry::Get().Read(device, state.token);
    CheckSlot(*open.locked.arena, open.slot, state.token);
  }
}

void TakeSnapshot(const State& state) {
  if (state.token.version == 0) return;
  std::vector<Registry::Wanted> wanted;
  for (const DeviceId device : state.devices) wanted.push_back({device, state.token});
  const std::vector<Snapshot> snapshots = Registry::Get().HoldAll(wanted);
  for (int i = 0; i < 2; ++i) {
    for (const Snapshot& snapshot : snapshots) {
      uint8_t sample[kSample];
      snapshot.ReadBytes(0, Snapshot::Kind::kCodes, 0, 0, kSample, sample);
      Check("snapshot", sample, Pattern(state.token.handle, state.token.version));
    }
    std::this_thread::yield();
  }
}

// Writes all codes and words, as paged_optax.reset does.
void Rewrite(State& state) {
  if (state.token.version == 0) return;
  const int64_t num_elements = kDims[0] * kDims[1], num_blocks = num_elements / kBlockSize;
  const int32_t next = NextVersion(state.token.version);
  const std::vector<uint8_t> bytes(num_elements, Pattern(state.token.handle, next));
  const LeafRewrite::Bytes codes{bytes.data(), num_elements}, words{bytes.data(), 4 * num_blocks};
  const size_t num_states = state.has_parts() ? 1 : 2;
  for (const DeviceId device : state.devices) {
    const int32_t version = Registry::Get().Rewrite(
        device, state.token,
        {{0, {num_states, codes}, std::vector<LeafRewrite::Bytes>(num_states, words)}});
    // After a step that began and did not end, another version than was foreseen.
    if (version != next) throw StatusError(StatusCode::kFailedPrecondition, "other bytes");
  }
  state.token.version = next;
}

PlacementPolicy Policy(bool pinned, std::string directory = "") {
  return {-1, 0, pinned, std::move(directory)};
}

// ---------------------------------------------------------------------------------------------------

class Worker {
 public:
  static inline std::atomic<int> num_actions{0};

  Worker(unsigned seed, const std::atomic<bool>& stop) : random_(seed), stop_(stop) {}

  void Run() {
    while (!stop_) {
      try {
        Act();
      } catch (const StatusError&) {
        // Refused, for this state or for one of another thread. Somebody may have released it.
        if (!states_.empty()) Drop(random_() % states_.size());
      }
    }
    while (!states_.empty()) Drop(0);
  }

 private:
  void Act() {
    ++num_actions;
    Registry& registry = Registry::Get();
    if (states_.size() < 3) return Add();
    const size_t i = random_() % states_.size();
    State& state = states_[i];
    switch (random_() % 20) {
      case 0:
        return Drop(i);
      case 1:
        return TakeSnapshot(state);
      case 2:
        registry.Describe(state.token);
        return;
      case 3:
        registry.Limit(state.token, random_() % 2 ? -1 : static_cast<int64_t>(random_() % 8) << 20);
        return;
      case 4:
        registry.NumArenas();
        registry.IsAlive(state.token.handle - static_cast<int32_t>(random_() % 8));
        registry.handles().Forget(state.token.handle);
        return;
      case 5:
        registry.NewestVersion(state.token.handle - static_cast<int32_t>(random_() % 8));
        return;
      case 6:
        fake_cuda::taken_by_others =
            static_cast<int64_t>(random_() % 8) * (fake_cuda::kDeviceBytes / 8);
        return;
      case 7:
        if (random_() % 8 == 0)
          registry.Release(state.token.handle - static_cast<int32_t>(random_() % 4));
        return;
      case 8:
        if (random_() % 64 == 0) registry.ReleaseAll();
        return;
      case 9:
        return Read(state);
      case 10:
        return Rewrite(state);
      case 11:
        registry.FindNewest(state.token.handle - static_cast<int32_t>(random_() % 8));
        return;
      case 12:
        registry.DescribeAll();
        return;
      case 13:
        if (state.has_parts()) Step(state, Until::kBegun);
        return;
      default:
        return Step(state);
    }
  }

  void Add() {
    const Platform platform = random_() % 3 == 0 ? Platform::kCpu : Platform::kCuda;
    std::vector<DeviceId> devices = {{platform, static_cast<int>(random_() % 2)}};
    if (random_() % 3 == 0) devices = {{platform, 0}, {platform, 1}};
    const bool is_file = platform == Platform::kCpu && random_() % 2;
    states_.push_back(MakeState(devices, Policy(random_() % 2, is_file ? "." : ""),
                                1 + static_cast<int32_t>(random_() % 2), random_() % 4 == 0,
                                random_() % 3 == 0 ? kArrayRule : kAdam));
  }

  void Drop(size_t i) {
    const int32_t handle = states_[i].token.handle;
    states_.erase(states_.begin() + static_cast<int64_t>(i));
    Registry::Get().Release(handle);
  }

  std::mt19937 random_;
  const std::atomic<bool>& stop_;
  std::vector<State> states_;
};

void RunThreads(int seconds) {
  std::atomic<bool> stop{false};
  std::vector<std::thread> threads;
  for (unsigned seed = 0; seed < 6; ++seed)
    threads.emplace_back([&, seed] { Worker(seed, stop).Run(); });
  std::this_thread::sleep_for(std::chrono::seconds(seconds));
  stop = true;
  for (std::thread& thread : threads) thread.join();
  std::printf("%d actions\n", Worker::num_actions.load());
}

// ---------------------------------------------------------------------------------------------------

void Expect(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "%s\n", what);
  std::abort();
}

// What it is to do, the second time if it fails the first.
template <class F>
void Attempt(const F& action) {
  try {
    action();
  } catch (const StatusError&) {
    action();
  }
}

// A reset that fails leaves the moments as they were, or nobody gets them any more. Returns whether
// they are there.
bool Reset(State& state) {
  try {
    Rewrite(state);
    return true;
  } catch (const StatusError&) {
  }
  try {
    Read(state);
  } catch (const StatusError&) {
    return false;
  }
  Rewrite(state);
  return true;
}

// Every kind of memory, on one device and on two, with moves, questions and a restored state.
void Scenario() {
  constexpr DeviceId cpu0{Platform::kCpu, 0}, cpu1{Platform::kCpu, 1}, gpu0{Platform::kCuda, 0},
      gpu1{Platform::kCuda, 1};
  std::vector<State> states;
  states.push_back(MakeState({gpu0}, Policy(false), 1, false));
  states.push_back(MakeState({gpu1}, Policy(true), 2, false));
  states.push_back(MakeState({gpu0, gpu1}, Policy(true), 1, false));
  states.push_back(MakeState({gpu0, gpu1}, Policy(false), 1, true));
  states.push_back(MakeState({cpu0, cpu1}, Policy(false), 1, false));
  states.push_back(MakeState({cpu0}, Policy(false, "."), 1, true));
  Registry& registry = Registry::Get();
  for (State& state : states) {
    Attempt([&] { Step(state); });
    Attempt([&] { registry.Limit(state.token, 0); });
    try {
      Attempt([&] { Step(state); });
    } catch (const Disagreement&) {  // the GPU that refused reports it, and not to the next state
      try {
        registry.ThrowIfRefused();
      } catch (const StatusError&) {
      }
      continue;
    }
    Attempt([&] { registry.Limit(state.token, -1); });
    // Where writes can fail, and once of each: they take a sanitizer long.
    const bool is_reset = &state == &states[0] || &state == &states[2];
    if (is_reset && !Reset(state)) continue;
    Attempt([&] { TakeSnapshot(state); });
    Attempt([&] { Read(state); });
    Attempt([&] { registry.Describe(state.token); });
    Attempt([&] { registry.DescribeAll(); });
    Attempt([&] { registry.FindNewest(state.token.handle); });
  }
  for (const State& state : states) {
    if (state.token.version < 1) std::abort();
    Attempt([&] { registry.Release(state.token.handle); });
    Attempt([&] { registry.Release(state.token.handle); });
  }
}

// Runs it as often as it makes calls of this name (any, if it is empty), each time with another one
// that fails. Returns how many those are.
template <class F>
int FailEachCall(const char* name, const F& scenario) {
  for (int after = 0;; ++after) {
    Faults::Get().Ask(name, after, /*error=*/2);
    try {
      scenario();
    } catch (const StatusError& error) {
      std::fprintf(stderr, "call %d, %s: %s\n", after, Faults::Get().Last().c_str(), error.what());
      std::abort();
    }
    if (Faults::Get().Withdraw()) return after;  // there are no more calls
  }
}

// Others have all memory of the device when the thread looks for room, and give it back before the
// one who waits for the thread looks again.
void RunRoomThatComesLate() {
  State state = MakeState({{Platform::kCuda, 0}}, Policy(true), 1, false);
  Step(state);
  Registry& registry = Registry::Get();
  registry.Limit(state.token, 0);
  for (int question = 1; question <= 4; ++question) {
    fake_cuda::full_at_question = question;
    registry.Limit(state.token, -1);
    fake_cuda::full_at_question = 0;
    registry.Limit(state.token, -1);
    Expect(registry.Describe(state.token).at(0).resident_bytes > 0, "the moments are not back");
    registry.Limit(state.token, 0);
  }
  registry.Release(state.token.handle);
}

// Nothing waits for a state that nobody has, as a token of zeros does not name one either.
void RunUnknownTokens() {
  State state = MakeState({{Platform::kCuda, 0}}, Policy(true), 1, false);
  Step(state);
  Registry& registry = Registry::Get();
  const DeviceId gpu = state.devices[0];
  const auto is_refused = [](const auto& question) {
    try {
      question();
    } catch (const StatusError& error) {
      return error.code() == StatusCode::kFailedPrecondition;
    }
    return false;
  };
  for (const int32_t handle : {0, 1, -1, 123456789}) {
    const Token token{handle, 1};
    for (const bool refuses : {is_refused([&] { registry.Describe(token); }),
                               is_refused([&] { registry.Read(gpu, token); }),
                               is_refused([&] { registry.HoldAll({{gpu, token}}); }),
                               is_refused([&] { registry.Rewrite(gpu, token, {}); }),
                               is_refused([&] { registry.Limit(token, 0); })}) {
      Expect(refuses, "a token that nobody has is not refused");
    }
    Expect(registry.Release(handle) == 0, "something was freed");
  }
  registry.Release(state.token.handle);
}

std::atomic<int> g_enqueued[2];  // collectives, by GPU

// What is queued on a GPU is done when the other one has as many collectives to answer them.
void AwaitCollectives(int device) {
  for (const int mine = g_enqueued[device]; g_enqueued[1 - device] < mine;) {
    std::this_thread::yield();
  }
}

const std::vector<DeviceId> kTwoGpus = {{Platform::kCuda, 0}, {Platform::kCuda, 1}};

// Calls `step(gpu)` so many times on each GPU, from a thread for each as XLA does it, with a
// collective before every step; and `meanwhile()` until they are done.
template <class F, class G>
void Train(int num_steps, const F& step, const G& meanwhile) {
  std::atomic<int> num_running{2};
  const auto train = [&](int gpu) {
    for (int i = 0; i < num_steps; ++i) {
      ++g_enqueued[gpu];
      step(gpu);
      while (g_enqueued[gpu] > g_enqueued[1 - gpu] + 16) std::this_thread::yield();
      std::this_thread::sleep_for(std::chrono::microseconds(100));
    }
    --num_running;
  };
  std::thread first(train, 0), second(train, 1);
  while (num_running > 0) meanwhile();
  first.join();
  second.join();
}

// Steps one state in Train: what each GPU has of it.
struct Trained {
  std::vector<State> on_gpus;
  std::atomic<int32_t> versions[2];

  explicit Trained(const State& state)
      : on_gpus{state, state}, versions{state.token.version, state.token.version} {}
  void operator()(int gpu) {
    State& state = on_gpus[gpu];
    state.token = StepOnGpu(state, kTwoGpus[gpu], g_next_run++, Until::kEnd);
    versions[gpu] = state.token.version;
  }
  // That both have reached.
  int32_t version() const { return std::min(versions[0].load(), versions[1].load()); }
};

// All steps are refused; somebody asks meanwhile.
void RunCollectives() {
  const std::vector<DeviceId>& gpus = kTwoGpus;
  State sound = MakeState(gpus, Policy(false), 1, false);
  Step(sound);
  State newer = sound, foreign = MakeState(gpus, Policy(false), 2, false);
  newer.token.version = 1000;
  foreign.token = {123456789, 5};  // no arena is like its own, so each step looks at its token
  fake_cuda::on_wait = AwaitCollectives;
  for (const State& state : {newer, foreign}) {
    Trained trained(state);
    Train(200, std::ref(trained), [&] { Registry::Get().Describe(sound.token); });
    Expect(trained.version() == state.token.version, "the step is not refused");
  }
  fake_cuda::on_wait = nullptr;
  Registry::Get().Release(sound.token.handle);
}

// Saves `saved` while `trained` is stepped, which may be the same state, and another thread asks.
void SaveWhileTraining(State& saved, State& trained) {
  Trained trains(trained);
  const bool is_same = &saved == &trained;
  int num_saves = 0;
  const auto save = [&] {
    if (is_same) saved.token.version = trains.version();
    try {
      TakeSnapshot(saved);
      ++num_saves;
    } catch (const StatusError&) {  // it was stepped since
    }
  };
  std::atomic<bool> is_over{false};
  std::thread asks([&] {
    while (!is_over) Registry::Get().DescribeAll();
  });
  const int32_t before = trained.token.version;
  Train(300, std::ref(trains), save);
  is_over = true;
  asks.join();
  trained.token.version = trains.version();
  Expect(trained.token.version == before + 300, "a step is lost");
  save();
  Expect(num_saves > 0, "nothing was saved");
  std::printf("%d saves\n", num_saves);
}

// Another state is stepped while `held` is held, which waits itself.
void StepWhileHeld(State& held, State& other) {
  std::optional<std::vector<Snapshot>> snapshots =
      Registry::Get().HoldAll({{kTwoGpus[0], held.token}, {kTwoGpus[1], held.token}});
  Trained goes_on(other), waits(held);
  const int32_t before = other.token.version, its = held.token.version;
  Train(50, std::ref(goes_on), [] { std::this_thread::yield(); });
  Expect(goes_on.version() == before + 50, "another state waits for a save");
  std::thread training([&] { Train(1, std::ref(waits), [] { std::this_thread::yield(); }); });
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  Expect(waits.versions[0] == its && waits.versions[1] == its, "it is stepped while it is held");
  std::atomic<int64_t> moved{-1};
  std::thread moving([&] { moved = Registry::Get().Limit(held.token, 0); });
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  const auto reports = Registry::Get().Describe(held.token);
  Expect(moved == -1 && reports[0].resident_bytes > 0, "it moves while it is held");
  snapshots.reset();
  training.join();
  moving.join();
  Expect(waits.version() == its + 1, "the step after a save is lost");
  for (const ArenaReport& report : Registry::Get().Describe(held.token))
    Expect(report.resident_bytes == 0, "it does not move after a save");
}

void RunSaves() {
  for (const int32_t num_slots : {1, 2}) {
    State saved = MakeState(kTwoGpus, Policy(false), num_slots, false);
    State other = MakeState(kTwoGpus, Policy(true), num_slots, false);
    Step(saved);
    Step(other);
    fake_cuda::on_wait = AwaitCollectives;
    SaveWhileTraining(saved, other);
    SaveWhileTraining(saved, saved);
    StepWhileHeld(saved, other);
    fake_cuda::on_wait = nullptr;
    Registry::Get().Release(saved.token.handle);
    Registry::Get().Release(other.token.handle);
  }
}

// A state that could not be released does no harm to those that come after it.
void ReleaseThatFails() {
  const DeviceId gpu{Platform::kCuda, 0};
  State released = MakeState({gpu}, Policy(false), 1, false);
  State kept = MakeState({gpu}, Policy(false), 1, false);
  for (State* state : {&released, &kept}) Attempt([&] { Step(*state); });
  try {
    Registry::Get().Release(released.token.handle);
  } catch (const StatusError&) {
  }
  Attempt([&] { Step(kept); });
  Attempt([&] { Read(kept); });
  for (const State& state : {released, kept})
    Attempt([&] { Registry::Get().Release(state.token.handle); });
}

void RunFaults() {
  const int num_faults = FailEachCall("", Scenario) + FailEachCall("", ReleaseThatFails);
  for (const char* name : {"launch", "thread"}) FailEachCall(name, Scenario);
  std::printf("%d calls failed once\n", num_faults);
  if (num_faults < 100) std::abort();
}

void RunFiles() {
  SaveAndLoad(/*many=*/true);
  for (const char* name : {"open", "fallocate", "pwrite", "pread", "direct pread", "thread"}) {
    const int count = FailEachCall(name, [] { SaveAndLoad(/*many=*/false); });
    std::printf("%s: %d calls\n", name, count);
  }
  Expect(fake_cuda::NumPinned() == 0, "memory stays pinned");
  const int num_kept = FailEachCall("cudaHostUnregister", [] { SaveAndLoad(/*many=*/false); });
  Expect(num_kept > 0 && fake_cuda::NumPinned() == num_kept, "pinned memory was freed");
}

void RunHandles() {
  constexpr DeviceId first{Platform::kCpu, 0}, second{Platform::kCpu, 1};
  constexpr int kMany = 5000;
  using Claim = Handles::Claim;
  Handles handles;
  // One device is 5,000 inits and first uses ahead of the other.
  std::vector<int32_t> of_first;
  for (int i = 0; i < kMany; ++i) {
    of_first.push_back(handles.Issue(first, 1, {7}, false));
    Expect(handles.ClaimFirstUse(of_first.back(), 1) == Claim::kFirst, "not a first use");
  }
  for (int i = 0; i < kMany; ++i) {
    Expect(handles.Issue(second, 1, {7}, false) == of_first[i], "devices disagree");
    Expect(handles.ClaimFirstUse(of_first[i], 1) == Claim::kLater, "not a first use on the second");
    Expect(handles.ClaimFirstUse(of_first[i], 2) == Claim::kNone, "a first use in another run");
  }
  // Places of one seed that the devices run in another order.
  const int here = 0, there = 0;
  const int32_t at_here = handles.Issue(first, 2, {7, &here}, false);
  const int32_t at_there = handles.Issue(first, 2, {7, &there}, false);
  Expect(at_here != at_there, "one handle for two states");
  Expect(handles.Issue(second, 2, {7, &there}, false) == at_there, "places are mixed up");
  Expect(handles.Issue(second, 2, {7, &here}, false) == at_here, "places are mixed up");
  // Two jobs, one after the other.
  handles.SetSharedBase(1000);
  const int32_t of_job = handles.Issue(first, 3, {1}, true);
  handles.SetSharedBase(5000000);
  const int32_t of_next = handles.Issue(first, 4, {1}, true);
  Expect(of_next - of_job == 5000000 - 1000, "the base of the first job counts");
  Expect(handles.OriginOf(of_job) == Handles::Origin::kUnused, "the first job is forgotten");
  // A first use that fails is as if it had not been.
  handles.UndoFirstUse(of_first[0], 1, StatusError(StatusCode::kResourceExhausted, "no memory"));
  Expect(handles.WasUndone(of_first[0], 1), "not undone");
  Expect(handles.ClaimFirstUse(of_first[0], 9) == Claim::kFirst, "no first use after one undone");
  try {
    handles.ClaimFirstUse(of_first[0], 1);
    Expect(false, "a device that is late makes an arena");
  } catch (const StatusError&) {
  }
  handles.Release(of_first[0]);
  Expect(!handles.WasUndone(of_first[0], 1), "kept after release");
}

int Main(int argc, char** argv) {
  if (argc == 3 && std::strcmp(argv[1], "threads") == 0) {
    RunThreads(std::atoi(argv[2]));
  } else if (argc == 2 && std::strcmp(argv[1], "handles") == 0) {
    RunHandles();
  } else if (argc == 2 && std::strcmp(argv[1], "faults") == 0) {
    RunFaults();
  } else if (argc == 2 && std::strcmp(argv[1], "files") == 0) {
    RunFiles();
  } else if (argc == 2 && std::strcmp(argv[1], "room") == 0) {
    RunRoomThatComesLate();
  } else if (argc == 2 && std::strcmp(argv[1], "unknown") == 0) {
    RunUnknownTokens();
  } else if (argc == 2 && std::strcmp(argv[1], "collectives") == 0) {
    RunCollectives();
  } else if (argc == 2 && std::strcmp(argv[1], "saves") == 0) {
    RunSaves();
  } else {
    return 2;
  }
  Registry& registry = Registry::Get();
  registry.ReleaseAll();
  const int64_t num_arenas = registry.NumArenas();
  registry.StopPagers();
  std::printf("arenas left %d\n", static_cast<int>(num_arenas));
  return num_arenas != 0;
}

}  // namespace
}  // namespace paged_optax

int main(int argc, char** argv) { return paged_optax::Main(argc, argv); }
