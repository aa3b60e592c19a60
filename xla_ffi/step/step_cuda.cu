// The kernel that resolves a token, small kernels for tokens and segments, and the launch.
#include <algorithm>
#include <array>
#include <string>
#include <vector>

#include "base/cuda_check.h"
#include "step/array_cuda.h"
#include "step/kernel_cuda.h"
#include "step/launch_cuda.h"
#include "step/token_cuda.h"

namespace paged_optax {
namespace {

// Leaves travel to the device by value, with the first kernel: nothing to stage, nothing to keep
// alive. A launch takes longer the more it is handed, so small trees are handed less. Of larger
// trees, further launches bring the rest.
constexpr int kFewLeaves = 60;
constexpr int kManyLeaves = 500;

template <int kLeaves>
struct LeafCopy {
  Leaf leaves[kLeaves];
  int num_leaves;
  Leaf* destination;
};

struct ResolveArgs {
  Header* headers;
  int num_headers;
  Reports* reports;
  ResolvedStep* resolved;
  const Token* token;
  const int32_t* count;
  const float* hyperparams;
  const int32_t* part;
  Token* new_token;
  StepKind kind;
  uint64_t fingerprint;
  Region regions[kFormats.size()];
};

static_assert(sizeof(ResolveArgs) + sizeof(LeafCopy<kManyLeaves>) <= 32764,
              "kernel parameters of CUDA 12.1 and newer");

template <int kLeaves>
__device__ void CopyLeaves(const LeafCopy<kLeaves>& copy) {
  static_assert(sizeof(Leaf) % sizeof(uint64_t) == 0);
  constexpr int kWordsPerLeaf = sizeof(Leaf) / sizeof(uint64_t);
  const uint64_t* source = reinterpret_cast<const uint64_t*>(copy.leaves);
  uint64_t* destination = reinterpret_cast<uint64_t*>(copy.destination);
  for (int i = threadIdx.x; i < copy.num_leaves * kWordsPerLeaf; i += blockDim.x) {
    destination[i] = source[i];
  }
}

template <int kLeaves>
__global__ void CopyLeavesKernel(const __grid_constant__ LeafCopy<kLeaves> copy) {
  CopyLeaves(copy);
}

template <class... Rule>
__device__ void Prepare(List<Rule...>, const ResolveArgs& args, int32_t count, AnyStep& step) {
  int i = 0;
  ((i++ == args.kind.rule ? void(reinterpret_cast<StepOf<typename Rule::Arithmetic>&>(step) =
                                     PrepareStep<Rule>(args.kind, args.hyperparams, count))
                          : void()),
   ...);
}

__device__ void ReportRestart(const ResolveArgs& args, const Header& header, int32_t steps) {
  if (steps == 0 || args.reports == nullptr) return;
  volatile Restart* report = &args.reports->restart;
  if (report->steps != 0) return;
  report->handle = header.handle;
  __threadfence_system();
  report->steps = steps;
}

// One thread: judges the token and advances the version. Everything after it on the stream sees the
// outcome.
__device__ void Resolve(const ResolveArgs& args, Token token, Header* header) {
  Judgement judgement = Judge(header, token, LayoutOf(args.fingerprint, *args.part));
  ResolvedStep& resolved = *args.resolved;
  const int32_t count = *args.count;
  judgement.verdict = JudgeCount(judgement.verdict, count);
  const bool skipped = IsAccepted(judgement.verdict) && count == kSkipStep;
  resolved.accepted = IsAccepted(judgement.verdict) && !skipped;
  if (resolved.accepted) {
    Prepare(Rules(), args, StepsSeen(*header, judgement, count), resolved.step);
    const SegmentTable& segments = *header->segments;
    const bool is_fresh = judgement.verdict == Verdict::kFresh;
    resolved.source = is_fresh ? nullptr : segments.bases[judgement.source];
    resolved.target = segments.bases[judgement.target];
    resolved.log2_chunks = segments.log2_chunks;
    const int64_t resident_bytes =
        (int64_t{segments.num_resident} << segments.log2_chunks) * kChunkBytes;
    for (int i = 0; i < Formats::kSize; ++i) {
      resolved.resident_blocks[i] = args.regions[i].BlocksBelow(resident_bytes);
    }
    ReportRestart(args, *header, StepsToEnd(*header, judgement.verdict));
    resolved.header = header;
    resolved.before = *header;
    resolved.target_slot = judgement.target;
    const bool opens = args.kind.output == Output::kOpen;
    *args.new_token = opens ? Open(header, judgement, count) : Advance(header, judgement, count);
    return;
  }
  *args.new_token = token;
  if (skipped) return;
  ReportRejection(args.reports, token, judgement.verdict, header, args.fingerprint);
}

// One thread block: finds the arena that the token names, and copies the leaves.
template <int kLeaves>
__global__ void ResolveKernel(const __grid_constant__ ResolveArgs args,
                              const __grid_constant__ LeafCopy<kLeaves> copy) {
  CopyLeaves(copy);
  if (threadIdx.x >= kWarpSize) return;
  const Token token = *args.token;
  Header* const header = FindHeader(args.headers, args.num_headers, token);
  if (threadIdx.x == 0) Resolve(args, token, header);
}

// After a launch that failed. `is_whole`: before anything was written.
__global__ void UndoKernel(const ResolvedStep* resolved, bool is_whole) {
  if (!resolved->accepted) return;
  *resolved->header = resolved->before;
  if (!is_whole) resolved->header->versions[resolved->target_slot] = 0;
}

__global__ void WriteTokenKernel(Token token, Token* destination) { *destination = token; }

__global__ void WriteSegmentsKernel(const __grid_constant__ SegmentTable segments,
                                    SegmentTable* destination) {
  for (int i = threadIdx.x; i < kMaxSlots * kMaxSegments; i += kThreads) {
    (&destination->bases[0][0])[i] = (&segments.bases[0][0])[i];
  }
  if (threadIdx.x == 0) destination->num_resident = segments.num_resident;
}

}  // namespace

void LaunchWriteToken(Token token, Token* destination, int device, Stream stream) {
  ScopedDevice scope(device);
  CUDA_LAUNCH(WriteTokenKernel<<<1, 1, 0, stream>>>(token, destination));
}

void LaunchWriteSegments(const SegmentTable& segments, SegmentTable* destination, int device,
                         Stream stream) {
  ScopedDevice scope(device);
  CUDA_LAUNCH(WriteSegmentsKernel<<<1, kThreads, 0, stream>>>(segments, destination));
}

namespace {

using Kernel = void (*)(RegionStep);

template <class Rule, class Format>
Kernel FindStepKernel(Output output) {
  if constexpr (kHasOwnKernels<Format>) {
    switch (output) {
      case Output::kDirection:
        return StepKernel<Rule, Format, static_cast<int>(Output::kDirection)>;
      case Output::kUpdate:
        return StepKernel<Rule, Format, static_cast<int>(Output::kUpdate)>;
      case Output::kParams:
        return StepKernel<Rule, Format, static_cast<int>(Output::kParams)>;
      case Output::kOpen:
        break;
    }
    return nullptr;
  } else {
    return StepKernel<Rule, Format, kAnyOutput>;
  }
}

// nullptr if there is no such rule or format, or the rule has no arithmetic.
Kernel FindKernel(const StepKind& kind, int format) {
  Kernel found = nullptr;
  Visit(Rules(), kind.rule, [&](auto rule) {
    using Rule = typename decltype(rule)::type::Arithmetic;
    if constexpr (!kIsAny<Rule>) {
      Visit(Formats(), format, [&](auto chosen) {
        using Format = typename decltype(chosen)::type;
        found = FindStepKernel<Rule, Format>(kind.output);
      });
    }
  });
  return found;
}

size_t LeavesOffset() {
  return static_cast<size_t>(RoundUp(sizeof(ResolvedStep), kScratchAlignment));
}

template <int kLeaves>
LeafCopy<kLeaves> MakeCopy(const CudaUpdate& update, Leaf* table, int64_t begin, int64_t end) {
  LeafCopy<kLeaves> copy{};
  copy.num_leaves = static_cast<int>(std::min<int64_t>(end - begin, kLeaves));
  copy.destination = table + begin;
  std::copy_n(update.leaves + begin, copy.num_leaves, copy.leaves);
  return copy;
}

int64_t NumLeaves(const CudaUpdate& update) {
  int64_t num_leaves = 0;
  for (const RegionWork& work : update.regions) num_leaves += work.num_leaves;
  return num_leaves;
}

// Judges the token, and brings the first leaves.
void LaunchResolve(const CudaUpdate& update, ResolvedStep* resolved, Leaf* table, Stream stream) {
  ResolveArgs args{update.headers,   update.num_headers, update.reports,     resolved,
                   update.token,     update.count,       update.hyperparams, update.part,
                   update.new_token, update.kind,        update.fingerprint, {}};
  for (size_t i = 0; i < update.regions.size(); ++i) args.regions[i] = update.regions[i].region;
  const int64_t num_leaves = NumLeaves(update);
  if (num_leaves <= kFewLeaves) {
    CUDA_LAUNCH(ResolveKernel<<<1, kThreads, 0, stream>>>(
        args, MakeCopy<kFewLeaves>(update, table, 0, num_leaves)));
  } else {
    CUDA_LAUNCH(ResolveKernel<<<1, kThreads, 0, stream>>>(
        args, MakeCopy<kManyLeaves>(update, table, 0, num_leaves)));
  }
}

// The leaves of a large tree that the first kernel had no room for.
void LaunchMoreLeaves(const CudaUpdate& update, Leaf* table, Stream stream) {
  const int64_t num_leaves = NumLeaves(update);
  for (int64_t begin = kManyLeaves; begin < num_leaves; begin += kManyLeaves) {
    CUDA_LAUNCH(CopyLeavesKernel<<<1, kThreads, 0, stream>>>(
        MakeCopy<kManyLeaves>(update, table, begin, num_leaves)));
  }
}

}  // namespace

size_t ScratchBytes(size_t num_leaves) { return LeavesOffset() + num_leaves * sizeof(Leaf); }

namespace {

// The kernel of a region, and how many thread blocks it takes.
struct RegionLaunch {
  Kernel kernel;
  unsigned blocks;
};

// What can fail comes before the version advances: this loads the kernel, which takes memory.
RegionLaunch PrepareLaunch(const StepKind& kind, const Region& region, int format, int device) {
  const Kernel kernel = FindKernel(kind, format);
  return {kernel, static_cast<unsigned>(NumThreadBlocks(kernel, region.num_blocks, device))};
}

[[noreturn]] void Undo(const ResolvedStep* resolved, bool is_whole, const StatusError& error,
                       Stream stream) {
  std::string text = error.what();
  try {
    CUDA_LAUNCH(UndoKernel<<<1, 1, 0, stream>>>(resolved, is_whole));
  } catch (const StatusError&) {
    is_whole = false;
  }
  text += is_whole
              ? ". No step was made: the moments are as they were."
              : ". Part of the step was made, so the moments of this optimizer state cannot be "
                "trusted any more (with replay=True, those before the step can). Make a new "
                "state with init(params).";
  throw StatusError(error.code(), text);
}

}  // namespace

void LaunchUpdate(const CudaUpdate& update, int device, Stream stream) {
  ScopedDevice scope(device);
  auto* resolved = static_cast<ResolvedStep*>(update.scratch);
  Leaf* table = reinterpret_cast<Leaf*>(static_cast<uint8_t*>(update.scratch) + LeavesOffset());
  if (update.kind.output == Output::kOpen) {
    // Its leaves come with later calls (array_cuda.cu).
    CudaUpdate alone = update;
    std::vector<int> formats;
    for (int i = 0; i < Formats::kSize; ++i) {
      if (update.regions[i].num_leaves != 0) formats.push_back(i);
      alone.regions[i].num_leaves = 0;
    }
    PrepareArrays(formats, device);
    return LaunchResolve(alone, resolved, table, stream);
  }
  std::array<RegionLaunch, Formats::kSize> launches{};
  for (int i = 0; i < Formats::kSize; ++i) {
    const Region& region = update.regions[i].region;
    if (region.num_blocks != 0) launches[i] = PrepareLaunch(update.kind, region, i, device);
  }
  LaunchResolve(update, resolved, table, stream);
  bool is_whole = true;
  try {
    LaunchMoreLeaves(update, table, stream);
    for (int i = 0; i < Formats::kSize; ++i) {
      const auto [kernel, blocks] = launches[i];
      if (kernel == nullptr) continue;
      const RegionWork& work = update.regions[i];
      CUDA_LAUNCH(kernel<<<blocks, kThreads, 0, stream>>>({resolved, table + work.first_leaf,
                                                           work.num_leaves, work.region, i,
                                                           update.kind.output}));
      is_whole = false;
    }
  } catch (const StatusError& error) {
    Undo(resolved, is_whole, error, stream);
  }
}

}  // namespace paged_optax
