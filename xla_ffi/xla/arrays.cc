// See arrays.h.
#include "xla/arrays.h"

#include <algorithm>
#include <cstring>
#include <optional>
#include <string>
#include <string_view>

#include "base/random.h"
#include "state/cpu_device.h"
#include "state/shards.h"
#include "step/array_cpu.h"
#include "xla/call.h"
#include "xla/ffi/api/ffi.h"
#include "xla/guarded.h"
#include "xla/parallel_for.h"

namespace ffi = ::xla::ffi;

namespace paged_optax {
namespace {

[[noreturn]] void Refuse(const std::string& problem) {
  throw StatusError(StatusCode::kInvalidArgument, "malformed load or store: " + problem);
}

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
  std::vector<Buffer> buffers;
  ffi::Span<const int64_t> leaves;  // their places in the tree
};

template <class T>
T* Scalars(ffi::AnyBuffer buffer, size_t count) {
  if (buffer.element_type() != ffi::DataType::S32 || buffer.element_count() != count) {
    Refuse("a scalar has another size or type");
  }
  return static_cast<T*>(buffer.untyped_data());
}

// Arrays are those of `get(i)`.
template <class F>
ArrayCall Parse(const Token* token, ffi::AnyBuffer new_token, ffi::Span<const int64_t> places,
                std::string_view shards, size_t count, const F& get) {
  if (places.size() != count) Refuse("a wrong number of leaves");
  ArrayCall call{token, Scalars<Token>(new_token, 2), {}, places};
  std::vector<Signature::LeafInfo> leaves;
  for (size_t i = 0; i < count; ++i) {
    const ffi::AnyBuffer buffer = get(i);
    const auto dims = buffer.dimensions();
    const auto size = static_cast<int64_t>(buffer.element_count());
    leaves.push_back({0, {dims.begin(), dims.end()}, size, 0});
    call.buffers.push_back({buffer.untyped_data(), DTypeOf(buffer.element_type()), size, 0});
  }
  const std::vector<uint64_t> stamps = StampsOf(leaves, shards);
  for (size_t i = 0; i < count; ++i) call.buffers[i].stamp = stamps[i];
  return call;
}

ArrayCall ParseLoad(ffi::Span<const int64_t> leaves, std::string_view shards,
                    const ffi::RemainingArgs& args, const ffi::RemainingRets& rets) {
  if (args.size() == 0 || args.size() != rets.size()) Refuse("a wrong number of operands");
  const Token* token = Scalars<Token>(*args.get<ffi::AnyBuffer>(0), 2);
  return Parse(token, **rets.get<ffi::AnyBuffer>(0), leaves, shards, rets.size() - 1,
               [&](size_t i) { return **rets.get<ffi::AnyBuffer>(1 + i); });
}

struct StoreCall {
  ArrayCall call;
  const int32_t* count;
};

StoreCall ParseStore(ffi::Span<const int64_t> leaves, std::string_view shards,
                     ffi::Span<const int64_t> keys, const ffi::RemainingArgs& args,
                     const ffi::RemainingRets& rets) {
  if (args.size() < 2 || rets.size() != 1) Refuse("a wrong number of operands");
  if (keys.size() != 0 && keys.size() != args.size() - 2) Refuse("a wrong number of keys");
  const Token* token = Scalars<Token>(*args.get<ffi::AnyBuffer>(0), 2);
  const int32_t* count = Scalars<int32_t>(*args.get<ffi::AnyBuffer>(1), 1);
  return {Parse(token, **rets.get<ffi::AnyBuffer>(0), leaves, shards, args.size() - 2,
                [&](size_t i) { return *args.get<ffi::AnyBuffer>(2 + i); }),
          count};
}

// ---------------------------------------------------------------------------------------------------
// CPU
// ---------------------------------------------------------------------------------------------------

// Where leaf `i` of a call lies. It was in the tree when the step was opened.
const ArrayPlace& PlaceOf(const Header& header, const ArrayCall& call, size_t i) {
  const int64_t leaf = call.leaves[i];
  if (leaf < 0 || leaf >= header.num_places || header.places[leaf].stamp != call.buffers[i].stamp) {
    throw StatusError(StatusCode::kInternal,
                      "the compiler cut leaf " + std::to_string(leaf) +
                          " of an optimizer state over the devices in another way than when its "
                          "step began. Give the parameters a sharding (jax.device_put or "
                          "in_shardings), so that it has no choice.");
  }
  return header.places[leaf];
}

void RunOnCpu(ffi::ThreadPool& pool, const std::vector<ArrayWork>& works, bool stores) {
  constexpr int64_t kBlocksPerTask = 64;
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
// and is not refused again.
template <class F, class G>
void IfOpen(Token token, const F& step, const G& leave_alone) {
  if (token.version >= 0) return leave_alone();
  OrRefuse(step, token, leave_alone);
}

ffi::Error LoadCpu(ffi::ThreadPool pool, int32_t device, ffi::Span<const int64_t> leaves,
                   std::string_view shards, ffi::RemainingArgs args, ffi::RemainingRets rets) {
  return Guarded([&] {
    const ArrayCall call = ParseLoad(leaves, shards, args, rets);
    const auto load = [&] {
      WithOpenSlot(device, *call.token, [&](Arena& arena, int32_t slot) {
        const int32_t source = FindOpenSource(arena.header, slot);
        uint8_t* const base = source < 0 ? nullptr : arena.segments.bases[source][0];
        std::vector<ArrayWork> works;
        for (size_t i = 0; i < call.buffers.size(); ++i) {
          const Buffer& buffer = call.buffers[i];
          works.push_back({buffer.data, buffer.dtype, PlaceOf(arena.header, call, i), base, 0, 0});
        }
        RunOnCpu(pool, works, /*stores=*/false);
      });
    };
    IfOpen(*call.token, load, [&] {
      for (const Buffer& buffer : call.buffers) {
        std::memset(buffer.data, 0, buffer.size * SizeOf(buffer.dtype));
      }
    });
    *call.new_token = *call.token;
  });
}

ffi::Error StoreCpu(ffi::ThreadPool pool, int32_t device, bool closes,
                    ffi::Span<const int64_t> keys, ffi::Span<const int64_t> leaves,
                    std::string_view shards, ffi::RemainingArgs args, ffi::RemainingRets rets) {
  return Guarded([&] {
    const auto [call, count] = ParseStore(leaves, shards, keys, args, rets);
    *call.new_token = *call.token;
    const uint32_t phase = DitherPhase(*count);
    const auto store = [&, &call = call] {
      WithOpenSlot(device, *call.token, [&](Arena& arena, int32_t slot) {
        std::vector<ArrayWork> works;
        for (size_t i = 0; i < call.buffers.size(); ++i) {
          const Buffer& buffer = call.buffers[i];
          const uint64_t key = keys.size() == 0 ? 0 : static_cast<uint64_t>(keys[i]);
          works.push_back({buffer.data, buffer.dtype, PlaceOf(arena.header, call, i),
                           arena.segments.bases[slot][0], key, phase});
        }
        RunOnCpu(pool, works, /*stores=*/true);
        if (closes) *call.new_token = Close(&arena.header, slot);
      });
    };
    IfOpen(*call.token, store, [] {});
  });
}

XLA_FFI_DEFINE_HANDLER(kLoadCpu, LoadCpu,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Ctx<ffi::DeviceOrdinal>()
                           .Attr<ffi::Span<const int64_t>>("leaves")
                           .Attr<std::string_view>("shards")
                           .RemainingArgs()    // token, arrays that are not read
                           .RemainingRets());  // token, arrays

XLA_FFI_DEFINE_HANDLER(kStoreCpu, StoreCpu,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Ctx<ffi::DeviceOrdinal>()
                           .Attr<bool>("closes")
                           .Attr<ffi::Span<const int64_t>>("keys")
                           .Attr<ffi::Span<const int64_t>>("leaves")
                           .Attr<std::string_view>("shards")
                           .RemainingArgs()    // token, count, arrays
                           .RemainingRets());  // token

}  // namespace

std::vector<HandlerEntry> ArrayHandlers() {
  return {
      {"paged_optax_load", "cpu", reinterpret_cast<void*>(kLoadCpu)},
      {"paged_optax_store", "cpu", reinterpret_cast<void*>(kStoreCpu)},
  };
}

}  // namespace paged_optax
