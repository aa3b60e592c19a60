// See arrays.h.
#include "xla/arrays.h"

#include <algorithm>
#include <cstring>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "base/random.h"
#include "state/cpu_device.h"
#include "state/shards.h"
#include "step/array_cpu.h"
#include "xla/call.h"
#include "xla/ffi/api/ffi.h"
#include "xla/guarded.h"
#include "xla/parallel_for.h"

#if PAGED_OPTAX_CUDA
#include "state/cuda_device.h"
#include "step/array_cuda.h"
#endif

namespace ffi = ::xla::ffi;

namespace paged_optax {

// What the program says of a load or store, in alphabetical order as XLA has attributes.
struct ArrayAttrs {
  bool closes;
  ffi::Span<const int8_t> formats;
  ffi::Span<const int64_t> keys;
  ffi::Span<const int64_t> leaves;
  std::string_view shards;
};

}  // namespace paged_optax

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(::paged_optax::ArrayAttrs, StructMember<bool>("closes"),
                                      StructMember<Span<const int8_t>>("formats"),
                                      StructMember<Span<const int64_t>>("keys"),
                                      StructMember<Span<const int64_t>>("leaves"),
                                      StructMember<std::string_view>("shards"));

namespace paged_optax {
namespace {

// An array in XLA's memory.
struct Buffer {
  void* data;
  DType dtype;
  int64_t size;
  uint64_t stamp;  // as in ArrayPlace
};

struct ArrayCall {
  const Token* token;
  Token* new_token;
  const int32_t* count;  // null to load
  std::vector<Buffer> buffers = {};
};

template <class T>
T* Scalars(ffi::AnyBuffer buffer, size_t count) {
  return static_cast<T*>(DataOf(buffer, ffi::DataType::S32, count, "a scalar"));
}

// Buffers are those of `get(i)`.
template <class F>
void ParseBuffers(const ArrayAttrs& attrs, size_t count, const F& get, ArrayCall& call) {
  if (count == 0 || attrs.leaves.size() != count || attrs.formats.size() != count ||
      (attrs.keys.size() != 0 && attrs.keys.size() != count)) {
    RefuseCall("a wrong number of leaves");
  }
  for (const int8_t format : attrs.formats) {
    if (format < 0 || format >= static_cast<int>(kFormats.size())) RefuseCall("an unknown format");
  }
  std::vector<Signature::LeafInfo> leaves;
  for (size_t i = 0; i < count; ++i) {
    const ffi::AnyBuffer buffer = get(i);
    const auto dims = buffer.dimensions();
    const auto size = static_cast<int64_t>(buffer.element_count());
    leaves.push_back({attrs.formats[i], {dims.begin(), dims.end()}, size, 0});
    call.buffers.push_back({buffer.untyped_data(), DTypeOf(buffer.element_type()), size, 0});
  }
  const std::vector<uint64_t> stamps = StampsOf(leaves, attrs.shards);
  for (size_t i = 0; i < count; ++i) call.buffers[i].stamp = stamps[i];
}

ArrayCall ParseLoad(const ArrayAttrs& attrs, const ffi::RemainingArgs& args,
                    const ffi::RemainingRets& rets) {
  if (args.size() == 0 || args.size() != rets.size()) RefuseCall("a wrong number of operands");
  ArrayCall call{Scalars<Token>(*args.get<ffi::AnyBuffer>(0), 2),
                 Scalars<Token>(**rets.get<ffi::AnyBuffer>(0), 2), nullptr};
  const auto get = [&](size_t i) { return **rets.get<ffi::AnyBuffer>(1 + i); };
  ParseBuffers(attrs, rets.size() - 1, get, call);
  return call;
}

ArrayCall ParseStore(const ArrayAttrs& attrs, const ffi::RemainingArgs& args,
                     const ffi::RemainingRets& rets) {
  if (args.size() < 2 || rets.size() != 1) RefuseCall("a wrong number of operands");
  ArrayCall call{Scalars<Token>(*args.get<ffi::AnyBuffer>(0), 2),
                 Scalars<Token>(**rets.get<ffi::AnyBuffer>(0), 2),
                 Scalars<int32_t>(*args.get<ffi::AnyBuffer>(1), 1)};
  const auto get = [&](size_t i) { return *args.get<ffi::AnyBuffer>(2 + i); };
  ParseBuffers(attrs, args.size() - 2, get, call);
  return call;
}

// ---------------------------------------------------------------------------------------------------
// CPU
// ---------------------------------------------------------------------------------------------------

// Where leaf `i` of a call lies. It was in the tree when the step was opened.
const ArrayPlace& PlaceOf(const Header& header, const ArrayAttrs& attrs, const ArrayCall& call,
                          size_t i) {
  const int64_t leaf = attrs.leaves[i];
  if (leaf < 0 || leaf >= header.num_places || header.places[leaf].format != attrs.formats[i] ||
      header.places[leaf].stamp != call.buffers[i].stamp) {
    throw StatusError(StatusCode::kInternal,
                      "the compiler cut leaf " + std::to_string(leaf) +
                          " of an optimizer state over the devices in another way than when its "
                          "step began. Give the parameters a sharding (jax.device_put or "
                          "in_shardings), so that it has no choice.");
  }
  return header.places[leaf];
}

void RunOnCpu(ffi::ThreadPool& pool, const std::vector<ArrayWork>& works, bool stores) {
  struct Task {
    const ArrayWork* work;
    int64_t begin;
  };
  std::vector<Task> tasks;
  for (const ArrayWork& work : works) {
    for (int64_t begin = 0; begin < NumBlocks(work.place.size); begin += kBlocksPerTask) {
      tasks.push_back({&work, begin});
    }
  }
  if (tasks.empty()) return;
  ParallelFor(pool, static_cast<int64_t>(tasks.size()), [&](int64_t i) {
    const ArrayWork& work = *tasks[i].work;
    const int64_t begin = tasks[i].begin, blocks = NumBlocks(work.place.size);
    FindArrayRun(work.place.format, stores)(work, begin, std::min(begin + kBlocksPerTask, blocks));
  });
}

// Calls body(arena, slot) for the slot that the token's step writes. Refuses the step if it is not
// open any more, because another one took the slot.
template <class F>
void WithOpenSlot(int32_t device, Token token, const F& body) {
  Registry& registry = Registry::Get();
  std::optional<LockedArena> locked = registry.At<CpuDevice>(device).TakeContents(token.handle);
  const int32_t slot = locked ? FindOpenSlot(&locked->arena->header, token) : -1;
  if (slot >= 0) return body(*locked->arena, slot);
  const int32_t version = locked ? locked->header.version : 0;
  const Verdict verdict = locked ? Verdict::kStale : Verdict::kUnknown;
  locked.reset();  // Explain looks at arenas too
  registry.Refuse({Platform::kCpu, device}, {verdict, token, version, 0});
}

// As OrRefuse. A step that was refused or skipped when it began came here with the token of before,
// and is not refused again. Nor is one that was lost meanwhile: its token gets version 0, so that
// the program sees that what it loads from here on is not its moments.
template <class F, class G>
void IfOpen(const ArrayCall& call, const F& step, const G& leave_alone) {
  const Token token = *call.new_token = *call.token;
  if (token.version >= 0) return leave_alone();
  OrRefuse(step, token, [&] {
    *call.new_token = LostToken(token);
    leave_alone();
  });
}

// What is to be done in the slot at `base`, with random bits for `phase`.
std::vector<ArrayWork> WorksOf(const Header& header, const ArrayAttrs& attrs, const ArrayCall& call,
                               uint8_t* base, uint32_t phase) {
  std::vector<ArrayWork> works;
  for (size_t i = 0; i < call.buffers.size(); ++i) {
    const Buffer& buffer = call.buffers[i];
    const uint64_t key = attrs.keys.size() == 0 ? 0 : static_cast<uint64_t>(attrs.keys[i]);
    works.push_back({buffer.data, buffer.dtype, PlaceOf(header, attrs, call, i), base, key, phase});
  }
  return works;
}

ffi::Error LoadCpu(ffi::ThreadPool pool, int32_t device, ArrayAttrs attrs, ffi::RemainingArgs args,
                   ffi::RemainingRets rets) {
  return Guarded([&] {
    const ArrayCall call = ParseLoad(attrs, args, rets);
    const auto load = [&] {
      WithOpenSlot(device, *call.token, [&](Arena& arena, int32_t slot) {
        const int32_t source = FindOpenSource(arena.header, slot);
        uint8_t* const base = source < 0 ? nullptr : arena.segments.bases[source][0];
        RunOnCpu(pool, WorksOf(arena.header, attrs, call, base, 0), /*stores=*/false);
      });
    };
    IfOpen(call, load, [&] {
      for (const Buffer& buffer : call.buffers) {
        std::memset(buffer.data, 0, buffer.size * SizeOf(buffer.dtype));
      }
    });
  });
}

ffi::Error StoreCpu(ffi::ThreadPool pool, int32_t device, ArrayAttrs attrs, ffi::RemainingArgs args,
                    ffi::RemainingRets rets) {
  return Guarded([&] {
    const ArrayCall call = ParseStore(attrs, args, rets);
    const auto store = [&] {
      WithOpenSlot(device, *call.token, [&](Arena& arena, int32_t slot) {
        uint8_t* const base = arena.segments.bases[slot][0];
        RunOnCpu(pool, WorksOf(arena.header, attrs, call, base, DitherPhase(*call.count)),
                 /*stores=*/true);
        if (attrs.closes) *call.new_token = Close(&arena.header, slot);
      });
    };
    IfOpen(call, store, [] {});
  });
}

XLA_FFI_DEFINE_HANDLER(kLoadCpu, LoadCpu,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Ctx<ffi::DeviceOrdinal>()
                           .Attrs<ArrayAttrs>()
                           .RemainingArgs()    // token, arrays that are not read
                           .RemainingRets());  // token, arrays

XLA_FFI_DEFINE_HANDLER(kStoreCpu, StoreCpu,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Ctx<ffi::DeviceOrdinal>()
                           .Attrs<ArrayAttrs>()
                           .RemainingArgs()    // token, count, arrays
                           .RemainingRets());  // token

// ---------------------------------------------------------------------------------------------------
// GPU
// ---------------------------------------------------------------------------------------------------

#if PAGED_OPTAX_CUDA

// The kernels find out whether the step is open, and where the leaves lie.
void RunOnGpu(int32_t device, const ArrayAttrs& attrs, const ArrayCall& call, cudaStream_t stream) {
  CudaDevice& gpu = Registry::Get().At<CudaDevice>(device);
  std::vector<CudaArray> arrays;
  for (size_t i = 0; i < call.buffers.size(); ++i) {
    const Buffer& buffer = call.buffers[i];
    const uint64_t key = attrs.keys.size() == 0 ? 0 : static_cast<uint64_t>(attrs.keys[i]);
    arrays.push_back({buffer.data, buffer.size, 0, buffer.stamp, key,
                      static_cast<int32_t>(attrs.leaves[i]), buffer.dtype, attrs.formats[i]});
  }
  ContentsLock lock = gpu.Acquire();
  gpu.AwaitHolds(lock, call.token, stream);
  const CudaArrayCall work{gpu.headers(lock), gpu.num_headers(lock), gpu.device_reports(),
                           call.token,        call.new_token,        call.count};
  gpu.LaunchPart(lock, stream, [&] {
    LaunchArrays(work, arrays, device, stream);
    if (attrs.closes && call.count != nullptr) LaunchClose(work, device, stream);
  });
}

ffi::Error LoadCuda(cudaStream_t stream, int32_t device, ArrayAttrs attrs, ffi::RemainingArgs args,
                    ffi::RemainingRets rets) {
  return Guarded([&] { RunOnGpu(device, attrs, ParseLoad(attrs, args, rets), stream); });
}

ffi::Error StoreCuda(cudaStream_t stream, int32_t device, ArrayAttrs attrs, ffi::RemainingArgs args,
                     ffi::RemainingRets rets) {
  return Guarded([&] { RunOnGpu(device, attrs, ParseStore(attrs, args, rets), stream); });
}

XLA_FFI_DEFINE_HANDLER(kLoadCuda, LoadCuda,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::PlatformStream<cudaStream_t>>()
                           .Ctx<ffi::DeviceOrdinal>()
                           .Attrs<ArrayAttrs>()
                           .RemainingArgs()    // token, arrays that are not read
                           .RemainingRets());  // token, arrays

XLA_FFI_DEFINE_HANDLER(kStoreCuda, StoreCuda,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::PlatformStream<cudaStream_t>>()
                           .Ctx<ffi::DeviceOrdinal>()
                           .Attrs<ArrayAttrs>()
                           .RemainingArgs()    // token, count, arrays
                           .RemainingRets());  // token

#endif  // PAGED_OPTAX_CUDA

}  // namespace

std::vector<HandlerEntry> ArrayHandlers() {
  return {
      {"paged_optax_load", "cpu", reinterpret_cast<void*>(kLoadCpu)},
      {"paged_optax_store", "cpu", reinterpret_cast<void*>(kStoreCpu)},
#if PAGED_OPTAX_CUDA
      {"paged_optax_load", "CUDA", reinterpret_cast<void*>(kLoadCuda)},
      {"paged_optax_store", "CUDA", reinterpret_cast<void*>(kStoreCuda)},
#endif
  };
}

}  // namespace paged_optax
