// The kernel that resolves a token, small kernels for tokens and segments, and the launch.
#include <algorithm>

#include "base/cuda_check.h"
#include "step/kernel_cuda.h"

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
  Rejection* rejection;
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
    *args.new_token = Advance(header, judgement, count);
    return;
  }
  *args.new_token = token;
  if (skipped) return;
  // The host reads this without waiting for the device; the first unread report stays.
  volatile Rejection* report = args.rejection;
  if (report->verdict != Verdict::kAccept) return;
  report->token.handle = token.handle;
  report->token.version = token.version;
  report->version = header == nullptr ? 0 : header->version;
  report->fingerprint = args.fingerprint;
  __threadfence_system();
  report->verdict = judgement.verdict;
}

// One thread block: finds the arena that the token names, and copies the leaves.
template <int kLeaves>
__global__ void ResolveKernel(const __grid_constant__ ResolveArgs args,
                              const __grid_constant__ LeafCopy<kLeaves> copy) {
  CopyLeaves(copy);
  if (threadIdx.x >= kWarpSize) return;
  const Token token = *args.token;
  int found = -1;
  for (int i = threadIdx.x; i < args.num_headers; i += kWarpSize) {
    if (args.headers[i].handle == token.handle) found = i;
  }
  found = __reduce_max_sync(0xffffffffu, found);
  if (threadIdx.x == 0) Resolve(args, token, found < 0 ? nullptr : &args.headers[found]);
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
  WriteTokenKernel<<<1, 1, 0, stream>>>(token, destination);
  CUDA_CHECK(cudaGetLastError());
}

void LaunchWriteSegments(const SegmentTable& segments, SegmentTable* destination, int device,
                         Stream stream) {
  ScopedDevice scope(device);
  WriteSegmentsKernel<<<1, kThreads, 0, stream>>>(segments, destination);
  CUDA_CHECK(cudaGetLastError());
}

namespace {

using Kernel = void (*)(RegionStep);

template <class Rule, class Format>
Kernel FindStepKernel(Output output) {
  if constexpr (kHasOwnKernels<Rule, Format>) {
    switch (output) {
      case Output::kDirection:
        return StepKernel<Rule, Format, static_cast<int>(Output::kDirection)>;
      case Output::kUpdate:
        return StepKernel<Rule, Format, static_cast<int>(Output::kUpdate)>;
      case Output::kParams:
        return StepKernel<Rule, Format, static_cast<int>(Output::kParams)>;
    }
    return nullptr;
  } else {
    return StepKernel<Rule, Format, kAnyOutput>;
  }
}

// nullptr if there is no such rule or format.
Kernel FindKernel(const StepKind& kind, int format) {
  Kernel found = nullptr;
  Visit(Rules(), kind.rule, [&](auto rule) {
    using Rule = typename decltype(rule)::type::Arithmetic;
    Visit(Formats(), format, [&](auto chosen) {
      using Format = typename decltype(chosen)::type;
      found = FindStepKernel<Rule, Format>(kind.output);
    });
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

void LaunchResolve(const CudaUpdate& update, ResolvedStep* resolved, Leaf* table, Stream stream) {
  ResolveArgs args{update.headers,   update.num_headers, update.rejection,   resolved,
                   update.token,     update.count,       update.hyperparams, update.part,
                   update.new_token, update.kind,        update.fingerprint, {}};
  int64_t num_leaves = 0;
  for (size_t i = 0; i < update.regions.size(); ++i) {
    args.regions[i] = update.regions[i].region;
    num_leaves += update.regions[i].num_leaves;
  }
  if (num_leaves <= kFewLeaves) {
    ResolveKernel<<<1, kThreads, 0, stream>>>(args,
                                              MakeCopy<kFewLeaves>(update, table, 0, num_leaves));
    CUDA_CHECK(cudaGetLastError());
    return;
  }
  ResolveKernel<<<1, kThreads, 0, stream>>>(args,
                                            MakeCopy<kManyLeaves>(update, table, 0, num_leaves));
  CUDA_CHECK(cudaGetLastError());
  for (int64_t begin = kManyLeaves; begin < num_leaves; begin += kManyLeaves) {
    CopyLeavesKernel<<<1, kThreads, 0, stream>>>(
        MakeCopy<kManyLeaves>(update, table, begin, num_leaves));
    CUDA_CHECK(cudaGetLastError());
  }
}

}  // namespace

size_t ScratchBytes(size_t num_leaves) { return LeavesOffset() + num_leaves * sizeof(Leaf); }

void LaunchUpdate(const CudaUpdate& update, int device, Stream stream) {
  ScopedDevice scope(device);
  auto* resolved = static_cast<ResolvedStep*>(update.scratch);
  Leaf* table = reinterpret_cast<Leaf*>(static_cast<uint8_t*>(update.scratch) + LeavesOffset());
  LaunchResolve(update, resolved, table, stream);
  int num_multiprocessors = 0;
  CUDA_CHECK(cudaDeviceGetAttribute(&num_multiprocessors, cudaDevAttrMultiProcessorCount, device));
  for (int i = 0; i < Formats::kSize; ++i) {
    const RegionWork& work = update.regions[i];
    if (work.region.num_blocks == 0) continue;
    const Kernel kernel = FindKernel(update.kind, i);
    int blocks_per_multiprocessor = 0;
    CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks_per_multiprocessor, kernel,
                                                             kThreads, 0));
    const int64_t blocks = std::min(int64_t{num_multiprocessors} * blocks_per_multiprocessor,
                                    (work.region.num_blocks + kWarps - 1) / kWarps);
    kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(
        {resolved, table + work.first_leaf, work.num_leaves, work.region, i, update.kind.output});
    CUDA_CHECK(cudaGetLastError());
  }
}

}  // namespace paged_optax
