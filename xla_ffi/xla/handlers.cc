// See handlers.h. The only file that includes XLA.
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
#include "state/registry.h"
#include "step/step.h"
#include "xla/ffi/api/ffi.h"

#if PAGED_OPTAX_CUDA
#include "base/cuda_check.h"
#include "state/cuda_device.h"
#include "step/step_cuda.h"
#endif

namespace ffi = ::xla::ffi;

namespace paged_optax {

// What the compiled program says of an update.
struct UpdateAttrs {
  ffi::Span<const int8_t> codecs;   // of the leaves
  ffi::Span<const int8_t> decayed;  // whether weight decay applies to a leaf; see takes_params
  int64_t device_bytes;             // budget, -1 for none
  std::string_view directory;       // CPU: of the file that holds the moments; empty for none
  int64_t headroom_bytes;
  ffi::Span<const int64_t> keys;  // of the leaves' random bits
  bool nesterov;
  int64_t num_devices;     // that the program runs on
  int64_t param_rounding;  // ParamRounding of 16-bit parameters
  int64_t paths;           // a number for the names of the leaves
  bool pinned;             // memory instead of managed memory
  bool replay;
  std::string_view shards;  // which part of the leaves each device has; empty if not known
  bool skip_elements;       // those whose gradient is not finite
  int64_t tree;             // a number for the tree structure, for Python

  // Whether learning rate, weight decay and parameters are operands; else `decayed` is empty.
  // `keys` may be empty where nothing is rounded at random.
  bool takes_params() const {
    return static_cast<ParamRounding>(param_rounding) != ParamRounding::kNone;
  }
  BadElement bad_element() const { return skip_elements ? BadElement::kSkip : BadElement::kNan; }
};

}  // namespace paged_optax

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(
    paged_optax::UpdateAttrs, ffi::StructMember<ffi::Span<const int8_t>>("codecs"),
    ffi::StructMember<ffi::Span<const int8_t>>("decayed"),
    ffi::StructMember<int64_t>("device_bytes"), ffi::StructMember<std::string_view>("directory"),
    ffi::StructMember<int64_t>("headroom_bytes"),
    ffi::StructMember<ffi::Span<const int64_t>>("keys"), ffi::StructMember<bool>("nesterov"),
    ffi::StructMember<int64_t>("num_devices"), ffi::StructMember<int64_t>("param_rounding"),
    ffi::StructMember<int64_t>("paths"), ffi::StructMember<bool>("pinned"),
    ffi::StructMember<bool>("replay"), ffi::StructMember<std::string_view>("shards"),
    ffi::StructMember<bool>("skip_elements"), ffi::StructMember<int64_t>("tree"));

namespace paged_optax {
namespace {

// ---------------------------------------------------------------------------------------------------
// Calls
// ---------------------------------------------------------------------------------------------------

ffi::ErrorCode CodeOf(const StatusError& error) {
  switch (error.code()) {
    case StatusCode::kInvalidArgument:
      return ffi::ErrorCode::kInvalidArgument;
    case StatusCode::kFailedPrecondition:
      return ffi::ErrorCode::kFailedPrecondition;
    case StatusCode::kResourceExhausted:
      return ffi::ErrorCode::kResourceExhausted;
    case StatusCode::kInternal:
      break;
  }
  return ffi::ErrorCode::kInternal;
}

// No exception leaves a handler.
template <class F>
ffi::Error Guarded(F&& body) {
  try {
    body();
    return ffi::Error::Success();
  } catch (const StatusError& error) {
    return ffi::Error(CodeOf(error), error.what());
  } catch (const std::exception& error) {
    return ffi::Error::Internal(std::string("paged_optax: ") + error.what());
  }
}

DType DTypeOf(ffi::DataType dtype) {
  switch (dtype) {
    case ffi::DataType::F32:
      return DType::kFloat32;
    case ffi::DataType::BF16:
      return DType::kBFloat16;
    case ffi::DataType::F16:
      return DType::kFloat16;
    default:
      throw StatusError(StatusCode::kInvalidArgument,
                        "gradients and parameters must be float32, bfloat16 or float16");
  }
}

// The operands of an update: token s32[2], count s32[], hyperparams f32[4], part s32[], then one
// gradient a leaf; where it takes the parameters hyperparams f32[6], and one parameter a leaf
// behind the gradients. A negative count is a step that is skipped. Its results: token s32[2], then
// one update a leaf.
struct UpdateCall {
  Signature signature;
  uint64_t fingerprint = 0;
  const Token* token = nullptr;
  const int32_t* count = nullptr;
  const float* hyperparams = nullptr;
  const int32_t* part = nullptr;
  Token* new_token = nullptr;
  std::vector<Leaf> leaves = {};
  int64_t num_work = 0;
};

template <class T>
T Operand(const ffi::RemainingArgs& args, size_t index, ffi::DataType dtype, size_t count) {
  const auto buffer = args.get<ffi::AnyBuffer>(index);
  if (!buffer.has_value() || buffer->element_type() != dtype || buffer->element_count() != count) {
    throw StatusError(StatusCode::kInvalidArgument,
                      "operand " + std::to_string(index) + " of the update is malformed");
  }
  return static_cast<T>(buffer->untyped_data());
}

UpdateCall Parse(const UpdateAttrs& attrs, const ffi::RemainingArgs& args,
                 const ffi::RemainingRets& rets) {
  const ffi::Span<const int8_t> codecs = attrs.codecs;
  constexpr size_t kOperands = 4;
  const bool takes_params = attrs.takes_params();
  const size_t num_leaves = codecs.size();
  const size_t num_extra = takes_params ? num_leaves : 0;
  if (args.size() != kOperands + num_leaves + num_extra || rets.size() != 1 + num_leaves ||
      attrs.decayed.size() != num_extra ||
      (attrs.keys.size() != num_leaves && (takes_params || attrs.keys.size() != 0))) {
    throw StatusError(StatusCode::kInvalidArgument,
                      "update called with a wrong number of operands");
  }
  UpdateCall call{Signature(attrs.paths, attrs.replay ? 2 : 1, attrs.num_devices, attrs.shards)};
  call.token = Operand<const Token*>(args, 0, ffi::DataType::S32, 2);
  call.count = Operand<const int32_t*>(args, 1, ffi::DataType::S32, 1);
  call.hyperparams = Operand<const float*>(
      args, 2, ffi::DataType::F32,
      static_cast<size_t>(takes_params ? kNumParamHyperparams : kNumHyperparams));
  call.part = Operand<const int32_t*>(args, 3, ffi::DataType::S32, 1);
  call.new_token = static_cast<Token*>((*rets.get<ffi::AnyBuffer>(0))->untyped_data());
  call.leaves.reserve(num_leaves);
  for (size_t i = 0; i < num_leaves; ++i) {
    const ffi::AnyBuffer grad = *args.get<ffi::AnyBuffer>(i + kOperands);
    auto update = *rets.get<ffi::AnyBuffer>(i + 1);
    const auto dims = grad.dimensions();
    const Codec codec = static_cast<Codec>(codecs[i]);
    Leaf leaf{};
    leaf.grads = grad.untyped_data();
    leaf.updates = update->untyped_data();
    leaf.size = static_cast<int64_t>(grad.element_count());
    leaf.first_block =
        call.signature.Append(codec, dims.begin(), static_cast<int64_t>(dims.size()));
    leaf.dtype = DTypeOf(grad.element_type());
    leaf.codec = codec;
    if (attrs.keys.size() != 0) leaf.key = static_cast<uint64_t>(attrs.keys[i]);
    if (takes_params) {
      const ffi::AnyBuffer param = *args.get<ffi::AnyBuffer>(i + kOperands + num_leaves);
      if (param.element_count() != grad.element_count()) {
        throw StatusError(StatusCode::kInvalidArgument,
                          "a parameter has another size than its gradient");
      }
      leaf.param_dtype = DTypeOf(param.element_type());
      leaf.rounding = leaf.param_dtype == DType::kFloat32
                          ? ParamRounding::kNone
                          : static_cast<ParamRounding>(attrs.param_rounding);
      leaf.decays = attrs.decayed[i] != 0;
      leaf.params = param.untyped_data();
      if (leaf.rounding == ParamRounding::kCompensated) call.signature.KeepResiduals();
    }
    call.leaves.push_back(leaf);
  }
  // In the order of the arena, so that what is resident comes first.
  std::stable_partition(call.leaves.begin(), call.leaves.end(),
                        [](const Leaf& leaf) { return Is8Bit(leaf.codec); });
  for (Leaf& leaf : call.leaves) {
    leaf.first_work = call.num_work;
    call.num_work += NumBlocks(leaf.size);
  }
  call.fingerprint = call.signature.Fingerprint();
  Registry::Get().Remember(call.signature, call.fingerprint);
  return call;
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
          part};
}

// Runs body(0) .. body(count - 1) on the calling thread and on whichever threads of the pool are
// free. The caller never waits for a task that has not started: pool threads may all be busy with
// other handlers that wait in the same way.
template <class F>
void ParallelFor(ffi::ThreadPool& pool, int64_t count, const F& body) {
  struct Progress {
    std::atomic<int64_t> next{0};
    int64_t done = 0;
    std::mutex mutex;
    std::condition_variable all_done;
  };
  auto progress = std::make_shared<Progress>();
  const F* shared_body = &body;  // valid while tasks remain, and only then used
  auto work = [progress, shared_body, count] {
    int64_t finished = 0;
    for (int64_t i; (i = progress->next++) < count; ++finished) (*shared_body)(i);
    if (finished == 0) return;
    std::lock_guard<std::mutex> lock(progress->mutex);
    progress->done += finished;
    if (progress->done == count) progress->all_done.notify_all();
  };
  const int64_t helpers = std::min(pool.num_threads(), count) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule(decltype(work)(work));
  work();
  std::unique_lock<std::mutex> lock(progress->mutex);
  progress->all_done.wait(lock, [&] { return progress->done == count; });
}

constexpr int64_t kBlocksPerTask = 64;

// ---------------------------------------------------------------------------------------------------
// Handlers
// ---------------------------------------------------------------------------------------------------

// The seed tells apart two calls of one program.
ffi::Error IssueCpu(ffi::RunId run, int32_t device, bool shared, ffi::BufferR1<ffi::S32> seed,
                    ffi::Result<ffi::BufferR1<ffi::S32>> token) {
  return Guarded([&] {
    const DeviceId id{Platform::kCpu, device};
    const int32_t handle =
        Registry::Get().handles().Issue(id, run.run_id, *seed.typed_data(), shared);
    *reinterpret_cast<Token*>(token->typed_data()) = {handle, 0};
  });
}

ffi::Error UpdateCpu(ffi::ThreadPool pool, ffi::RunId run, int32_t device, UpdateAttrs attrs,
                     ffi::RemainingArgs args, ffi::RemainingRets rets) {
  return Guarded([&] {
    const UpdateCall call = Parse(attrs, args, rets);
    Registry& registry = Registry::Get();
    const DeviceId id{Platform::kCpu, device};
    const Token token = *call.token;
    std::optional<LockedArena> locked =
        registry.Open(MakeRequest(id, run.run_id, attrs, call, *call.part), token);
    Arena* const arena = locked->arena.get();
    const Judgement judgement =
        Judge(&arena->header, token, LayoutOf(call.fingerprint, *call.part));
    if (!IsAccepted(judgement.verdict)) {
      const Rejection rejection{judgement.verdict, token, arena->header.version, call.fingerprint};
      locked.reset();  // Explain looks at arenas too
      throw StatusError(StatusCode::kFailedPrecondition, registry.Explain(id, rejection));
    }
    const int32_t count = *call.count;
    if (count < 0) {
      for (const Leaf& leaf : call.leaves) {
        std::memset(leaf.updates, 0, leaf.size * SizeOf(leaf.dtype));
      }
      *call.new_token = token;
      return;
    }
    const AdamStep step =
        MakeAdamStep(call.hyperparams, count, attrs.nesterov, attrs.bad_element());
    ParamStep param_step{};
    if (attrs.takes_params()) param_step = MakeParamStep(call.hyperparams, count);
    const auto& bases = arena->segments.bases;  // of one segment
    const bool fresh = judgement.verdict == Verdict::kFresh;
    const Work work{call.leaves.data(),
                    static_cast<int64_t>(call.leaves.size()),
                    call.num_work,
                    fresh ? nullptr : bases[judgement.source][0],
                    bases[judgement.target][0],
                    call.signature.extent(),
                    attrs.takes_params() ? &param_step : nullptr};
    const int64_t num_tasks = (call.num_work + kBlocksPerTask - 1) / kBlocksPerTask;
    ParallelFor(pool, num_tasks, [&](int64_t task) {
      StepBlocksCpu(step, work, task * kBlocksPerTask,
                    std::min((task + 1) * kBlocksPerTask, call.num_work));
    });
    *call.new_token = Advance(&arena->header, judgement);
  });
}

XLA_FFI_DEFINE_HANDLER(kIssueCpu, IssueCpu,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::RunId>()
                           .Ctx<ffi::DeviceOrdinal>()
                           .Attr<bool>("shared")
                           .Arg<ffi::BufferR1<ffi::S32>>()    // seed
                           .Ret<ffi::BufferR1<ffi::S32>>());  // token

XLA_FFI_DEFINE_HANDLER(kUpdateCpu, UpdateCpu,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Ctx<ffi::RunId>()
                           .Ctx<ffi::DeviceOrdinal>()
                           .Attrs<UpdateAttrs>()
                           .RemainingArgs()    // as UpdateCall says
                           .RemainingRets());  // token, updates

#if PAGED_OPTAX_CUDA

// The seed is in device memory; but the calls of a program run in the same order on every GPU.
ffi::Error IssueCuda(cudaStream_t stream, ffi::RunId run, int32_t device, bool shared,
                     ffi::BufferR1<ffi::S32> /*seed*/, ffi::Result<ffi::BufferR1<ffi::S32>> token) {
  return Guarded([&] {
    const DeviceId id{Platform::kCuda, device};
    const int32_t handle = Registry::Get().handles().Issue(id, run.run_id, /*seed=*/0, shared);
    LaunchWriteToken({handle, 0}, reinterpret_cast<Token*>(token->typed_data()), device, stream);
  });
}

ffi::Error UpdateCuda(cudaStream_t stream, ffi::ScratchAllocator scratch, ffi::RunId run,
                      int32_t device, UpdateAttrs attrs, ffi::RemainingArgs args,
                      ffi::RemainingRets rets) {
  return Guarded([&] {
    UpdateCall call = Parse(attrs, args, rets);
    Registry& registry = Registry::Get();
    CudaDevice& gpu = registry.At<CudaDevice>(device);
    registry.ThrowIfRejected(gpu);
    const ContentsLock lock = gpu.Acquire();
    if (gpu.MayBeFirstUse(lock, registry.handles(), run.run_id)) {
      // Only now does the host wait for the device.
      Token token;
      int32_t part;
      CUDA_CHECK(
          cudaMemcpyAsync(&token, call.token, sizeof(token), cudaMemcpyDeviceToHost, stream));
      CUDA_CHECK(cudaMemcpyAsync(&part, call.part, sizeof(part), cudaMemcpyDeviceToHost, stream));
      CUDA_CHECK(cudaStreamSynchronize(stream));
      gpu.BindOnFirstUse(lock, registry.handles(),
                         MakeRequest(gpu.id(), run.run_id, attrs, call, part), token, stream);
    }
    const auto resolved = scratch.Allocate(sizeof(ResolvedStep), alignof(ResolvedStep));
    if (!resolved.has_value()) {
      throw StatusError(StatusCode::kResourceExhausted, "XLA has no scratch memory left");
    }
    gpu.BeforeStep(lock, stream);
    LaunchUpdate(
        {gpu.headers(lock), gpu.num_headers(lock), call.token, call.count, call.hyperparams,
         call.part, call.new_token, gpu.device_rejection(), static_cast<ResolvedStep*>(*resolved),
         attrs.nesterov, attrs.bad_element(), attrs.takes_params(), call.fingerprint,
         call.signature.extent(), std::move(call.leaves), call.num_work},
        device, stream);
    gpu.AfterStep(lock, stream);
  });
}

XLA_FFI_DEFINE_HANDLER(kIssueCuda, IssueCuda,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::PlatformStream<cudaStream_t>>()
                           .Ctx<ffi::RunId>()
                           .Ctx<ffi::DeviceOrdinal>()
                           .Attr<bool>("shared")
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
                           .RemainingRets());  // token, updates

#endif  // PAGED_OPTAX_CUDA

}  // namespace

std::vector<HandlerEntry> Handlers() {
  return {
      {"paged_optax_issue", "cpu", reinterpret_cast<void*>(kIssueCpu)},
      {"paged_optax_update", "cpu", reinterpret_cast<void*>(kUpdateCpu)},
#if PAGED_OPTAX_CUDA
      {"paged_optax_issue", "CUDA", reinterpret_cast<void*>(kIssueCuda)},
      {"paged_optax_update", "CUDA", reinterpret_cast<void*>(kUpdateCuda)},
#endif
  };
}

std::pair<int, int> FfiApiVersion() { return {XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR}; }

}  // namespace paged_optax
