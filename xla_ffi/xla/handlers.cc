#include "xla/handlers.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/status.h"
#include "base/trace.h"
#include "state/registry.h"
#include "step/step_cpu.h"
#include "xla/arrays.h"
#include "xla/call.h"
#include "xla/ffi/api/ffi.h"
#include "xla/guarded.h"
#include "xla/norm_handlers.h"
#include "xla/parallel_for.h"

#if PAGED_OPTAX_CUDA
#include "base/cuda_check.h"
#include "state/cuda_device.h"
#include "step/step_cuda.h"
#include "xla/scratch.h"
#endif

namespace ffi = ::xla::ffi;

namespace paged_optax {
namespace {

// Prepares a step, which has not begun. What hinders it, such as a lack of memory or a damaged
// checkpoint, is a refusal too if no other device takes part. Of several devices, others may take
// the step, and copies of the parameters would differ: then the program has to fail.
template <class F>
auto Prepare(const UpdateCall& call, const F& prepare) {
  try {
    return prepare();
  } catch (const StatusError& error) {
    const bool no_memory = error.code() == StatusCode::kResourceExhausted;
    const bool is_other = !no_memory && error.code() != StatusCode::kInvalidArgument;
    if (is_other || call.signature.num_devices() > 1) throw;
    throw StatusError(StatusCode::kFailedPrecondition,
                      (no_memory ? "RESOURCE_EXHAUSTED: " : "") + std::string(error.what()));
  }
}

Request MakeRequest(DeviceId device, int64_t run, const UpdateAttrs& attrs, const UpdateCall& call,
                    int32_t part) {
  return {device,
          run,
          attrs.tree,
          attrs.shards,
          {attrs.device_bytes, attrs.headroom_bytes, attrs.pinned, std::string(attrs.directory)},
          &call.signature,
          call.fingerprint,
          part,
          attrs.names,
          attrs.restart};
}

// Steps all blocks of a call, region by region.
void RunOnCpu(ffi::ThreadPool& pool, const UpdateCall& call, const AnyStep& step,
              const uint8_t* source, uint8_t* target) {
  for (size_t i = 0; i < kFormats.size(); ++i) {
    const Region& region = call.extent.regions[i];
    if (region.num_blocks == 0) continue;
    const CpuWork work{call.leaves.data() + call.ranges[i].first,
                       call.ranges[i].count,
                       region,
                       source,
                       target,
                       call.kind.output};
    const CpuStep run = FindCpuStep(call.kind, static_cast<int8_t>(i));
    const int64_t num_tasks = (region.num_blocks + kBlocksPerTask - 1) / kBlocksPerTask;
    ParallelFor(pool, num_tasks, [&](int64_t task) {
      const int64_t begin = task * kBlocksPerTask;
      run(step, work, begin, std::min(begin + kBlocksPerTask, region.num_blocks));
    });
  }
}

// What a step returns that is skipped or refused: updates of zero, or parameters as they were, and
// the token that came in. The kernels do the same.
void ChangeNothing(const UpdateCall& call) {
  for (const Leaf& leaf : call.leaves) {
    if (call.kind.output == Output::kOpen) break;  // which has no results
    const size_t nbytes = leaf.size * SizeOf(leaf.result_dtype);
    if (call.kind.output != Output::kParams) {
      std::memset(leaf.results, 0, nbytes);
    } else if (leaf.results != leaf.params) {
      std::memcpy(leaf.results, leaf.params, nbytes);
    }
  }
  *call.new_token = *call.token;
}

// Throws if the step is refused. No contents are locked then.
void StepOnCpu(ffi::ThreadPool& pool, const Request& request, const UpdateCall& call) {
  Registry& registry = Registry::Get();
  const Token token = *call.token;
  std::optional<LockedArena> locked = Prepare(call, [&] { return registry.Open(request, token); });
  Arena* const arena = locked->arena.get();
  const int32_t count = *call.count;
  Judgement judgement = Judge(&arena->header, token, LayoutOf(call.fingerprint, *call.part));
  judgement.verdict = JudgeCount(judgement.verdict, count);
  if (!IsAccepted(judgement.verdict)) {
    const Rejection rejection{judgement.verdict, token, arena->header.version, call.fingerprint};
    locked.reset();  // Explain looks at arenas too
    registry.Refuse(request.device, rejection);
  }
  if (count == kSkipStep) return ChangeNothing(call);
  const int32_t ended = StepsToEnd(arena->header, judgement.verdict);
  if (call.kind.output == Output::kOpen) {
    *call.new_token = Open(&arena->header, judgement, count);
    if (ended > 0) registry.NoteRestarted({ended, token.handle});
    return;
  }
  const AnyStep step =
      PrepareStep(call.kind, call.hyperparams, StepsSeen(arena->header, judgement, count));
  const auto& bases = arena->segments.bases;  // of one segment
  const bool fresh = judgement.verdict == Verdict::kFresh;
  RunOnCpu(pool, call, step, fresh ? nullptr : bases[judgement.source][0],
           bases[judgement.target][0]);
  *call.new_token = Advance(&arena->header, judgement, count);
  if (call.kind.output == Output::kParams && !call.leaves.empty()) {
    registry.copies().Note(request.device, token.handle, call.leaves[0].params);
  }
  if (ended > 0) registry.NoteRestarted({ended, token.handle});
}

// ---------------------------------------------------------------------------------------------------
// Handlers
// ---------------------------------------------------------------------------------------------------

Token* NewTokenOf(ffi::Result<ffi::BufferR1<ffi::S32>>& token) {
  if (token->element_count() != 2) RefuseCall("the new token has another size");
  return reinterpret_cast<Token*>(token->typed_data());
}

// The attribute `site` only has a place in memory, which is another for each call of a program.
ffi::Error IssueCpu(ffi::RunId run, int32_t device, bool shared, std::string_view site,
                    ffi::BufferR1<ffi::S32> seed, ffi::Result<ffi::BufferR1<ffi::S32>> token) {
  return Guarded([&] {
    const DeviceId id{Platform::kCpu, device};
    Token* const new_token = NewTokenOf(token);
    if (seed.element_count() != 2) RefuseCall("the seed has another size");
    const int32_t handle =
        Registry::Get().handles().Issue(id, run.run_id, {*seed.typed_data(), site.data()}, shared);
    *new_token = {handle, 0};
  });
}

ffi::Error UpdateCpu(ffi::ThreadPool pool, ffi::RunId run, int32_t device, UpdateAttrs attrs,
                     ffi::RemainingArgs args, ffi::RemainingRets rets) {
  return Guarded([&] {
    const UpdateCall call = Parse(attrs, args, rets);
    const DeviceId id{Platform::kCpu, device};
    const Request request = MakeRequest(id, run.run_id, attrs, call, *call.part);
    OrRefuse([&] { StepOnCpu(pool, request, call); }, *call.token, [&] { ChangeNothing(call); });
  });
}

XLA_FFI_DEFINE_HANDLER(kIssueCpu, IssueCpu,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::RunId>()
                           .Ctx<ffi::DeviceOrdinal>()
                           .Attr<bool>("shared")
                           .Attr<std::string_view>("site")
                           .Arg<ffi::BufferR1<ffi::S32>>()    // seed
                           .Ret<ffi::BufferR1<ffi::S32>>());  // token

XLA_FFI_DEFINE_HANDLER(kUpdateCpu, UpdateCpu,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Ctx<ffi::RunId>()
                           .Ctx<ffi::DeviceOrdinal>()
                           .Attrs<UpdateAttrs>()
                           .RemainingArgs()    // as UpdateCall says
                           .RemainingRets());  // token, results

#if PAGED_OPTAX_CUDA

// The seed is in device memory; but the calls of a program run in the same order on every GPU.
ffi::Error IssueCuda(cudaStream_t stream, ffi::RunId run, int32_t device, bool shared,
                     std::string_view /*site*/, ffi::BufferR1<ffi::S32> /*seed*/,
                     ffi::Result<ffi::BufferR1<ffi::S32>> token) {
  return Guarded([&] {
    const DeviceId id{Platform::kCuda, device};
    Token* const new_token = NewTokenOf(token);
    const int32_t handle = Registry::Get().handles().Issue(id, run.run_id, {/*seed=*/0}, shared);
    LaunchWriteToken({handle, 0}, new_token, device, stream);
  });
}

// `reports`: where the kernels report, or null.
void Launch(CudaDevice& gpu, const ContentsLock& lock, const UpdateCall& call, Reports* reports,
            ffi::ScratchAllocator& scratch, cudaStream_t stream) {
  const Scratch memory(scratch, ScratchBytes(call.leaves.size()), gpu.id().ordinal, stream);
  CudaUpdate update{};
  update.headers = gpu.headers(lock);
  update.num_headers = gpu.num_headers(lock);
  update.reports = reports;
  update.scratch = memory.data();
  update.token = call.token;
  update.count = call.count;
  update.hyperparams = call.hyperparams;
  update.part = call.part;
  update.new_token = call.new_token;
  update.kind = call.kind;
  update.fingerprint = call.fingerprint;
  update.leaves = call.leaves.data();
  for (size_t i = 0; i < kFormats.size(); ++i) {
    update.regions[i] = {call.extent.regions[i], call.ranges[i].first, call.ranges[i].count};
  }
  gpu.LaunchStep(lock, stream, [&] { LaunchUpdate(update, gpu.id().ordinal, stream); });
}

ffi::Error UpdateCuda(cudaStream_t stream, ffi::ScratchAllocator scratch, ffi::RunId run,
                      int32_t device, UpdateAttrs attrs, ffi::RemainingArgs args,
                      ffi::RemainingRets rets) {
  const TraceRange range("paged_optax: step");
  return Guarded([&] {
    const UpdateCall call = Parse(attrs, args, rets);
    Registry& registry = Registry::Get();
    CudaDevice& gpu = registry.At<CudaDevice>(device);
    registry.CollectReports();
    registry.handles().NoteCall();
    std::shared_ptr<const Source> source;  // outlives the lock
    bool is_refused = false;
    std::shared_ptr<Arena> made;
    Token token{};
    ContentsLock lock = gpu.Acquire();
    if (gpu.MayBeFirstUse(lock, registry.handles(), run.run_id, call.fingerprint)) {
      // Only now does the host wait for the device.
      int32_t part;
      CUDA_CHECK(
          cudaMemcpyAsync(&token, call.token, sizeof(token), cudaMemcpyDeviceToHost, stream));
      CUDA_CHECK(cudaMemcpyAsync(&part, call.part, sizeof(part), cudaMemcpyDeviceToHost, stream));
      CUDA_CHECK(cudaStreamSynchronize(stream));
      Request request = MakeRequest(gpu.id(), run.run_id, attrs, call, part);
      if (token.version == 1) request.source = source = registry.handles().SourceOf(token.handle);
      // If it is refused, the kernels find no arena, and so change nothing.
      const auto bind = [&] {
        return gpu.BindOnFirstUse(lock, registry.handles(), request, token, stream);
      };
      OrRefuse([&] { made = Prepare(call, bind); }, token, [&] { is_refused = true; });
    }
    try {
      gpu.AwaitHolds(lock, call.token, stream);
      Reports* const reports = is_refused ? nullptr : gpu.device_reports();
      Launch(gpu, lock, call, reports, scratch, stream);
    } catch (const std::exception& error) {
      if (made) registry.handles().UndoFirstUse(token.handle, run.run_id, error);
      throw;
    }
    if (made) gpu.EndFirstUse(registry.handles(), *made, source != nullptr, stream);
    // The host does not know which state this is, but of one state alone it can say something.
    if (call.kind.output == Output::kParams && gpu.num_headers(lock) == 1 && !call.leaves.empty()) {
      registry.copies().Note(gpu.id(), 0, call.leaves[0].params);
    }
  });
}

XLA_FFI_DEFINE_HANDLER(kIssueCuda, IssueCuda,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::PlatformStream<cudaStream_t>>()
                           .Ctx<ffi::RunId>()
                           .Ctx<ffi::DeviceOrdinal>()
                           .Attr<bool>("shared")
                           .Attr<std::string_view>("site")
                           .Arg<ffi::BufferR1<ffi::S32>>()    // seed
                           .Ret<ffi::BufferR1<ffi::S32>>());  // token

XLA_FFI_DEFINE_HANDLER(kUpdateCuda, UpdateCuda,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::PlatformStream<cudaStream_t>>()
                           .Ctx<ffi::ScratchAllocator>()
                           .Ctx<ffi::RunId>()
                           .Ctx<ffi::DeviceOrdinal>()
                           .Attrs<UpdateAttrs>()
                           .RemainingArgs()    // as UpdateCall says
                           .RemainingRets());  // token, results

#endif  // PAGED_OPTAX_CUDA

}  // namespace

std::vector<HandlerEntry> Handlers() {
  std::vector<HandlerEntry> handlers = NormHandlers();
  handlers.insert(handlers.end(),
                  {
                      {"paged_optax_issue", "cpu", reinterpret_cast<void*>(kIssueCpu)},
                      {"paged_optax_update", "cpu", reinterpret_cast<void*>(kUpdateCpu)},
#if PAGED_OPTAX_CUDA
                      {"paged_optax_issue", "CUDA", reinterpret_cast<void*>(kIssueCuda)},
                      {"paged_optax_update", "CUDA", reinterpret_cast<void*>(kUpdateCuda)},
#endif
                  });
  for (const HandlerEntry& entry : ArrayHandlers()) handlers.push_back(entry);
  return handlers;
}

std::vector<std::pair<const char*, const char*>> UpdateAttributes() { return DescribeAttrs(); }

std::pair<int, int> FfiApiVersion() { return {XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR}; }

}  // namespace paged_optax
