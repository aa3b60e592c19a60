// The XLA handlers and the Python module: decodes calls, picks the device's way, maps exceptions.
// The only file that includes XLA or Python.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <condition_variable>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "arena.h"
#include "memory.h"
#include "status.h"
#include "step.h"
#include "xla/ffi/api/ffi.h"

#if PAGED_OPTAX_CUDA
#include "cuda_check.h"
#include "step_cuda.h"
#endif

#ifndef PAGED_OPTAX_CUDA_ARCHS
#define PAGED_OPTAX_CUDA_ARCHS ""
#endif
#ifndef PAGED_OPTAX_NVCC_VERSION
#define PAGED_OPTAX_NVCC_VERSION ""
#endif

namespace ffi = ::xla::ffi;
namespace py = ::pybind11;

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
                        "gradients must be float32, bfloat16 or float16");
  }
}

// The operands of an update: token s32[2], count s32[], hyperparams f32[4], then one gradient a
// leaf. Its results: token s32[2], then one update a leaf.
struct UpdateCall {
  const Token* token;
  const int32_t* count;
  const float* hyperparams;
  Token* new_token;
  std::vector<Leaf> leaves;
  int64_t num_work = 0;
  Layout layout;
  uint64_t fingerprint;
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

UpdateCall Parse(ffi::Span<const int8_t> codecs, int64_t paths, const ffi::RemainingArgs& args,
                 const ffi::RemainingRets& rets) {
  constexpr size_t kOperands = 3;
  if (args.size() != codecs.size() + kOperands || rets.size() != codecs.size() + 1) {
    throw StatusError(StatusCode::kInvalidArgument,
                      "update called with a wrong number of operands");
  }
  UpdateCall call;
  call.token = Operand<const Token*>(args, 0, ffi::DataType::S32, 2);
  call.count = Operand<const int32_t*>(args, 1, ffi::DataType::S32, 1);
  call.hyperparams =
      Operand<const float*>(args, 2, ffi::DataType::F32, static_cast<size_t>(kNumHyperparams));
  call.new_token = static_cast<Token*>((*rets.get<ffi::AnyBuffer>(0))->untyped_data());
  call.leaves.reserve(codecs.size());
  for (size_t i = 0; i < codecs.size(); ++i) {
    const ffi::AnyBuffer grad = *args.get<ffi::AnyBuffer>(i + kOperands);
    auto update = *rets.get<ffi::AnyBuffer>(i + 1);
    const auto dims = grad.dimensions();
    const Codec codec = static_cast<Codec>(codecs[i]);
    Leaf leaf;
    leaf.grads = grad.untyped_data();
    leaf.updates = update->untyped_data();
    leaf.size = static_cast<int64_t>(grad.element_count());
    leaf.first_block = call.layout.Append(codec, dims.begin(), static_cast<int64_t>(dims.size()));
    leaf.first_work = call.num_work;
    leaf.dtype = DTypeOf(grad.element_type());
    leaf.codec = codec;
    call.num_work += NumBlocks(leaf.size);
    call.leaves.push_back(leaf);
  }
  call.layout.SetPaths(paths);
  call.fingerprint = call.layout.Fingerprint();
  Registry::Get().RememberLayout(call.layout, call.fingerprint);
  return call;
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
ffi::Error IssueCpu(ffi::RunId run, int32_t device, ffi::BufferR1<ffi::S32> seed,
                    ffi::Result<ffi::BufferR1<ffi::S32>> token) {
  return Guarded([&] {
    const DeviceId id{Platform::kCpu, device};
    const int32_t handle = Registry::Get().IssueHandle(id, run.run_id, *seed.typed_data());
    *reinterpret_cast<Token*>(token->typed_data()) = {handle, 0};
  });
}

ffi::Error UpdateCpu(ffi::ThreadPool pool, ffi::RunId run, int32_t device,
                     ffi::Span<const int8_t> codecs, bool nesterov, int64_t tree, int64_t paths,
                     int64_t device_bytes, int64_t headroom_bytes, ffi::RemainingArgs args,
                     ffi::RemainingRets rets) {
  return Guarded([&] {
    const UpdateCall call = Parse(codecs, paths, args, rets);
    Registry& registry = Registry::Get();
    const DeviceId id{Platform::kCpu, device};
    const Token token = *call.token;
    const auto arena = registry.Open(
        {id, run.run_id, tree, {device_bytes, headroom_bytes}, &call.layout, call.fingerprint},
        token);
    std::unique_lock<std::mutex> lock(arena->mutex);
    const Verdict verdict = Judge(&arena->header, token, call.fingerprint);
    if (!IsAccepted(verdict)) {
      const int32_t version = arena->header.version;
      lock.unlock();
      throw StatusError(StatusCode::kFailedPrecondition,
                        registry.Explain(verdict, id, token, version, call.fingerprint));
    }
    const AdamStep step = MakeAdamStep(call.hyperparams, *call.count, nesterov);
    const Work work{call.leaves.data(),   static_cast<int64_t>(call.leaves.size()),
                    call.num_work,        arena->memory.data(),
                    call.layout.extent(), verdict == Verdict::kFresh};
    const int64_t num_tasks = (call.num_work + kBlocksPerTask - 1) / kBlocksPerTask;
    ParallelFor(pool, num_tasks, [&](int64_t task) {
      StepBlocksCpu(step, work, task * kBlocksPerTask,
                    std::min((task + 1) * kBlocksPerTask, call.num_work));
    });
    arena->header.version = NextVersion(arena->header.version);
    *call.new_token = {token.handle, arena->header.version};
  });
}

XLA_FFI_DEFINE_HANDLER(kIssueCpu, IssueCpu,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::RunId>()
                           .Ctx<ffi::DeviceOrdinal>()
                           .Arg<ffi::BufferR1<ffi::S32>>()    // seed
                           .Ret<ffi::BufferR1<ffi::S32>>());  // token

XLA_FFI_DEFINE_HANDLER(kUpdateCpu, UpdateCpu,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Ctx<ffi::RunId>()
                           .Ctx<ffi::DeviceOrdinal>()
                           .Attr<ffi::Span<const int8_t>>("codecs")
                           .Attr<bool>("nesterov")
                           .Attr<int64_t>("tree")
                           .Attr<int64_t>("paths")
                           .Attr<int64_t>("device_bytes")
                           .Attr<int64_t>("headroom_bytes")
                           .RemainingArgs()    // token, count, hyperparams, gradients
                           .RemainingRets());  // token, updates

#if PAGED_OPTAX_CUDA

// The seed is in device memory; but the calls of a program run in the same order on every GPU.
ffi::Error IssueCuda(cudaStream_t stream, ffi::RunId run, int32_t device,
                     ffi::BufferR1<ffi::S32> /*seed*/, ffi::Result<ffi::BufferR1<ffi::S32>> token) {
  return Guarded([&] {
    const DeviceId id{Platform::kCuda, device};
    const int32_t handle = Registry::Get().IssueHandle(id, run.run_id, /*seed=*/0);
    LaunchWriteToken({handle, 0}, reinterpret_cast<Token*>(token->typed_data()), device, stream);
  });
}

ffi::Error UpdateCuda(cudaStream_t stream, ffi::ScratchAllocator scratch, ffi::RunId run,
                      int32_t device, ffi::Span<const int8_t> codecs, bool nesterov, int64_t tree,
                      int64_t paths, int64_t device_bytes, int64_t headroom_bytes,
                      ffi::RemainingArgs args, ffi::RemainingRets rets) {
  return Guarded([&] {
    UpdateCall call = Parse(codecs, paths, args, rets);
    Registry& registry = Registry::Get();
    DeviceTable& table = registry.Table(device);
    registry.ThrowIfRejected(table);
    std::lock_guard<std::mutex> lock(table.mutex);
    if (registry.MayBeFirstUse(run.run_id, table)) {
      // Only now does the host wait for the device.
      Token token;
      CUDA_CHECK(
          cudaMemcpyAsync(&token, call.token, sizeof(token), cudaMemcpyDeviceToHost, stream));
      CUDA_CHECK(cudaStreamSynchronize(stream));
      registry.BindOnFirstUse({{Platform::kCuda, device},
                               run.run_id,
                               tree,
                               {device_bytes, headroom_bytes},
                               &call.layout,
                               call.fingerprint},
                              token, table, stream);
    }
    const auto resolved = scratch.Allocate(sizeof(ResolvedStep), alignof(ResolvedStep));
    if (!resolved.has_value()) {
      throw StatusError(StatusCode::kResourceExhausted, "XLA has no scratch memory left");
    }
    const bool has_arena = !table.arenas.empty();
    LaunchUpdate({has_arena ? table.headers() : nullptr, static_cast<int>(table.arenas.size()),
                  call.token, call.count, call.hyperparams, call.new_token,
                  table.device_rejection(), static_cast<ResolvedStep*>(*resolved), nesterov,
                  call.fingerprint, call.layout.extent(), std::move(call.leaves), call.num_work},
                 device, stream);
  });
}

XLA_FFI_DEFINE_HANDLER(kIssueCuda, IssueCuda,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::PlatformStream<cudaStream_t>>()
                           .Ctx<ffi::RunId>()
                           .Ctx<ffi::DeviceOrdinal>()
                           .Arg<ffi::BufferR1<ffi::S32>>()    // seed
                           .Ret<ffi::BufferR1<ffi::S32>>());  // token

XLA_FFI_DEFINE_HANDLER(kUpdateCuda, UpdateCuda,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::PlatformStream<cudaStream_t>>()
                           .Ctx<ffi::ScratchAllocator>()
                           .Ctx<ffi::RunId>()
                           .Ctx<ffi::DeviceOrdinal>()
                           .Attr<ffi::Span<const int8_t>>("codecs")
                           .Attr<bool>("nesterov")
                           .Attr<int64_t>("tree")
                           .Attr<int64_t>("paths")
                           .Attr<int64_t>("device_bytes")
                           .Attr<int64_t>("headroom_bytes")
                           .RemainingArgs()    // token, count, hyperparams, gradients
                           .RemainingRets());  // token, updates

#endif  // PAGED_OPTAX_CUDA

// ---------------------------------------------------------------------------------------------------
// Python module
// ---------------------------------------------------------------------------------------------------

template <class Handler>
py::capsule Capsule(Handler* handler) {
  return py::capsule(reinterpret_cast<void*>(handler));
}

py::list Targets() {
  py::list targets;
  targets.append(py::make_tuple("paged_optax_issue", "cpu", Capsule(kIssueCpu)));
  targets.append(py::make_tuple("paged_optax_update", "cpu", Capsule(kUpdateCpu)));
#if PAGED_OPTAX_CUDA
  targets.append(py::make_tuple("paged_optax_issue", "CUDA", Capsule(kIssueCuda)));
  targets.append(py::make_tuple("paged_optax_update", "CUDA", Capsule(kUpdateCuda)));
#endif
  return targets;
}

py::dict BuildInfo() {
  py::dict info;
  info["version"] = PAGED_OPTAX_VERSION;
  info["ffi_api"] = py::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR);
#if PAGED_OPTAX_CUDA
  info["cuda"] = true;
#else
  info["cuda"] = false;
#endif
  info["nvcc"] = PAGED_OPTAX_NVCC_VERSION;
  info["cuda_archs"] = PAGED_OPTAX_CUDA_ARCHS;
  return info;
}

// What the CUDA driver says of this machine; {"error": reason} where there is none to ask.
py::dict CudaInfo() {
  py::dict info;
#if PAGED_OPTAX_CUDA
  int driver = 0, count = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) {
    info["error"] = "no NVIDIA driver was found";
    return info;
  }
  info["driver"] = driver;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) {
    (void)cudaGetLastError();
    info["error"] = cudaGetErrorString(error);
    return info;
  }
  py::list devices;
  for (int i = 0; i < count; ++i) {
    cudaDeviceProp properties;
    CUDA_CHECK(cudaGetDeviceProperties(&properties, i));
    py::dict device;
    device["name"] = std::string(properties.name);
    device["compute_capability"] = py::make_tuple(properties.major, properties.minor);
    device["total_bytes"] = static_cast<int64_t>(properties.totalGlobalMem);
    device["managed"] = properties.managedMemory != 0;
    device["concurrent_managed"] = properties.concurrentManagedAccess != 0;
    char bus[32] = "";
    CUDA_CHECK(cudaDeviceGetPCIBusId(bus, sizeof(bus), i));
    device["pci_bus_id"] = std::string(bus);
    devices.append(device);
  }
  info["devices"] = devices;
#else
  info["error"] = "this build has no CUDA code";
#endif
  return info;
}

int64_t FreeDeviceMemory(int ordinal) {
#if PAGED_OPTAX_CUDA
  return FreeDeviceBytes(ordinal);
#else
  (void)ordinal;
  throw StatusError(StatusCode::kFailedPrecondition, "this build has no CUDA code");
#endif
}

DeviceId ParseDevice(const std::string& platform, int ordinal) {
  return {platform == "cpu" ? Platform::kCpu : Platform::kCuda, ordinal};
}

py::list Describe(int32_t handle, int32_t version) {
  std::vector<ArenaReport> reports;
  {
    py::gil_scoped_release unlocked;
    reports = Registry::Get().Describe({handle, version});
  }
  py::list result;
  for (const ArenaReport& report : reports) {
    py::list leaves;
    for (const Layout::LeafInfo& leaf : report.leaves) {
      leaves.append(py::make_tuple(static_cast<int>(leaf.codec), py::tuple(py::cast(leaf.dims))));
    }
    const bool resident = report.placement == Placement::kDevice;
    py::dict item;
    item["platform"] = report.device.platform == Platform::kCpu ? "cpu" : "cuda";
    item["ordinal"] = report.device.ordinal;
    item["version"] = report.version;
    item["tree"] = report.tree;
    item["total"] = report.nbytes;
    item["resident"] = resident ? report.nbytes : 0;
    item["leaves"] = leaves;
    result.append(item);
  }
  return result;
}

// The stored moments of one leaf: (mu, nu) float32, or (mu codes, nu codes, mu scales, nu scales),
// blocks concatenated, padding included.
py::tuple ReadLeaf(const std::string& platform, int ordinal, int32_t handle, int32_t version,
                   size_t index) {
  const DeviceId device = ParseDevice(platform, ordinal);
  const Token token{handle, version};
  Registry& registry = Registry::Get();
  std::vector<ArenaReport> reports;
  {
    py::gil_scoped_release unlocked;
    reports = registry.Describe(token);
  }
  for (const ArenaReport& report : reports) {
    if (!(report.device == device) || index >= report.leaves.size()) continue;
    const Layout::LeafInfo& leaf = report.leaves[index];
    ArenaExtent extent;
    for (const auto& other : report.leaves) {
      (other.codec == Codec::kDynamic ? extent.num_dynamic_blocks : extent.num_float32_blocks) +=
          NumBlocks(other.size);
    }
    const int64_t blocks = NumBlocks(leaf.size);
    // Addresses relative to the arena, from the same arithmetic that the kernels use.
    const auto offset = [](const void* address) {
      return static_cast<int64_t>(reinterpret_cast<uintptr_t>(address));
    };
    const auto read = [&](const void* address, int64_t nbytes, void* destination) {
      py::gil_scoped_release unlocked;
      registry.Read(device, token, offset(address), nbytes, destination);
    };
    if (leaf.codec == Codec::kFloat32) {
      py::array_t<float> mu(blocks * kBlockSize), nu(blocks * kBlockSize);
      for (int64_t b = 0, run; b < blocks; b += run) {
        run = std::min(blocks - b,
                       kFloat32BlocksPerChunk - (leaf.first_block + b) % kFloat32BlocksPerChunk);
        const Float32Block block = extent.LocateFloat32(nullptr, leaf.first_block + b);
        read(block.mu, run * kBlockSize * 4, mu.mutable_data() + b * kBlockSize);
        read(block.nu, run * kBlockSize * 4, nu.mutable_data() + b * kBlockSize);
      }
      return py::make_tuple(mu, nu);
    }
    py::array_t<uint8_t> mu(blocks * kBlockSize), nu(blocks * kBlockSize);
    py::array_t<float> mu_scales(blocks), nu_scales(blocks);
    for (int64_t b = 0, run; b < blocks; b += run) {
      run = std::min(blocks - b,
                     kDynamicBlocksPerChunk - (leaf.first_block + b) % kDynamicBlocksPerChunk);
      const DynamicBlock block = extent.LocateDynamic(nullptr, leaf.first_block + b);
      read(block.mu, run * kBlockSize, mu.mutable_data() + b * kBlockSize);
      read(block.nu, run * kBlockSize, nu.mutable_data() + b * kBlockSize);
      read(block.mu_scale, run * 4, mu_scales.mutable_data() + b);
      read(block.nu_scale, run * 4, nu_scales.mutable_data() + b);
    }
    return py::make_tuple(mu, nu, mu_scales, nu_scales);
  }
  throw StatusError(StatusCode::kInvalidArgument, "no such leaf on this device");
}

// The code alone, for the tests: codes of values that are already divided by their block's scale.
py::array_t<uint8_t> Encode(const py::array_t<float, py::array::c_style>& values, bool is_signed) {
  static constexpr DynamicMaps<int32_t> kMaps = MakeDynamicMaps<int32_t>();
  py::array_t<uint8_t> codes(values.size());
  for (py::ssize_t i = 0; i < values.size(); ++i) {
    codes.mutable_data()[i] = is_signed ? EncodeMu(kMaps.mu, values.data()[i], 1.0f)
                                        : EncodeNu(kMaps.nu, values.data()[i], 1.0f);
  }
  return codes;
}

// The step alone, for the tests: blocks [begin, end) of a single leaf, moments in `arena`.
void StepLeaf(py::buffer values, int dtype, int codec, py::buffer arena, int64_t begin, int64_t end,
              std::array<float, kNumHyperparams> hyperparams, int32_t count, bool nesterov,
              bool fresh) {
  const py::buffer_info values_info = values.request(/*writable=*/true);
  const py::buffer_info arena_info = arena.request(/*writable=*/true);
  Leaf leaf{values_info.ptr,
            values_info.ptr,
            values_info.size * values_info.itemsize,
            0,
            0,
            static_cast<DType>(dtype),
            static_cast<Codec>(codec)};
  leaf.size /= SizeOf(leaf.dtype);
  ArenaExtent extent;
  const int64_t blocks = NumBlocks(leaf.size);
  (leaf.codec == Codec::kDynamic ? extent.num_dynamic_blocks : extent.num_float32_blocks) = blocks;
  if (begin < 0 || end > blocks || extent.NumBytes() > arena_info.size * arena_info.itemsize) {
    throw StatusError(StatusCode::kInvalidArgument, "blocks outside the leaf, or arena too small");
  }
  const Work work{&leaf, 1, blocks, static_cast<uint8_t*>(arena_info.ptr), extent, fresh};
  StepBlocksCpu(MakeAdamStep(hyperparams.data(), count, nesterov), work, begin, end);
}

}  // namespace
}  // namespace paged_optax

PYBIND11_MODULE(_ext, module) {
  using namespace paged_optax;
  module.doc() = "Handlers and registry of paged_optax; use the Python package, not this module.";
  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const StatusError& error) {
      const bool memory = error.code() == StatusCode::kResourceExhausted;
      const bool argument = error.code() == StatusCode::kInvalidArgument;
      PyErr_SetString(memory     ? PyExc_MemoryError
                      : argument ? PyExc_ValueError
                                 : PyExc_RuntimeError,
                      error.what());
    }
  });
  module.def("targets", &Targets);
  module.def("build_info", &BuildInfo);
  module.def("cuda_info", &CudaInfo);
  module.def("free_device_bytes", &FreeDeviceMemory, py::arg("ordinal"));
  module.def("available_host_bytes", &AvailableHostBytes);
  module.def("check_host_memory", &CheckHostMemory);
  module.def("describe", &Describe, py::arg("handle"), py::arg("version"));
  module.def("read_leaf", &ReadLeaf, py::arg("platform"), py::arg("ordinal"), py::arg("handle"),
             py::arg("version"), py::arg("leaf"));
  module.def(
      "release", [](int32_t handle) { return Registry::Get().Release(handle); }, py::arg("handle"),
      py::call_guard<py::gil_scoped_release>());
  module.def("encode", &Encode, py::arg("values"), py::arg("signed"));
  module.def("step_leaf", &StepLeaf, py::arg("values"), py::arg("dtype"), py::arg("codec"),
             py::arg("arena"), py::arg("begin"), py::arg("end"), py::arg("hyperparams"),
             py::arg("count"), py::arg("nesterov") = false, py::arg("fresh") = false);
  module.def("arena_bytes", [](int64_t num_dynamic_blocks, int64_t num_float32_blocks) {
    return ArenaExtent{num_dynamic_blocks, num_float32_blocks}.NumBytes();
  });
#if PAGED_OPTAX_CUDA
  module.def("count_inexact", &CountInexact, py::arg("ordinal"));
#endif
  module.def(
      "raise_if_rejected", [] { Registry::Get().ThrowIfRejected(); },
      py::call_guard<py::gil_scoped_release>());
  module.def("num_arenas", [] { return Registry::Get().NumArenas(); });
  module.def("num_unused", [] { return Registry::Get().NumUnused(); });
}
