// The step on the GPU: one kernel that checks the token and one that runs a warp per block of
// moments. Adds to step.h and lane_cuda.h who does which blocks, and the launch.
#include <algorithm>

#include "base/cuda_check.h"
#include "step/lane_cuda.h"
#include "step/step_cuda.h"

namespace paged_optax {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;

using Maps = DynamicMaps<uint8_t>;
__device__ constexpr Maps kMaps = MakeDynamicMaps<uint8_t>();

struct ResolveArgs {
  Header* headers;
  int num_headers;
  const Token* token;
  const int32_t* count;
  const float* hyperparams;
  const int32_t* part;
  Token* new_token;
  Rejection* rejection;
  ResolvedStep* resolved;
  bool nesterov;
  BadElement bad_element;
  bool takes_params;
  uint64_t fingerprint;
  ArenaExtent extent;
};

// One warp: finds the arena that the token names, judges the token, advances the version.
// Everything behind it on the stream sees the outcome.
__global__ void ResolveKernel(ResolveArgs args) {
  const Token token = *args.token;
  int found = -1;
  for (int i = threadIdx.x; i < args.num_headers; i += kWarpSize) {
    if (args.headers[i].handle == token.handle) found = i;
  }
  found = __reduce_max_sync(0xffffffffu, found);
  if (threadIdx.x != 0) return;

  Header* header = found < 0 ? nullptr : &args.headers[found];
  const Judgement judgement = Judge(header, token, LayoutOf(args.fingerprint, *args.part));
  ResolvedStep& resolved = *args.resolved;
  const int32_t count = *args.count;
  const bool skipped = IsAccepted(judgement.verdict) && count < 0;
  resolved.accepted = IsAccepted(judgement.verdict) && !skipped;
  if (resolved.accepted) {
    resolved.step = MakeAdamStep(args.hyperparams, count, args.nesterov, args.bad_element);
    if (args.takes_params) resolved.params = MakeParamStep(args.hyperparams, count);
    const SegmentTable& segments = *header->segments;
    const bool is_fresh = judgement.verdict == Verdict::kFresh;
    resolved.source = is_fresh ? nullptr : segments.bases[judgement.source];
    resolved.target = segments.bases[judgement.target];
    resolved.log2_chunks = segments.log2_chunks;
    resolved.resident_blocks = args.extent.BlocksBelow(
        (int64_t{segments.num_resident} << segments.log2_chunks) * kChunkBytes);
    *args.new_token = Advance(header, judgement);
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

// Leaves travel to the kernel by value: nothing to stage, nothing to keep alive. A launch takes
// longer the more it is handed, so small trees are handed less.
constexpr int kFewLeaves = 60;
constexpr int kManyLeaves = 500;
template <int kLeaves>
struct StepArgs {
  Leaf leaves[kLeaves];
  int64_t num_leaves;
  int64_t work_before;  // in earlier launches of the call
  int64_t num_work;
  ArenaExtent extent;
  const ResolvedStep* resolved;
};
static_assert(sizeof(StepArgs<kManyLeaves>) <= 32764, "kernel parameters of CUDA 12.1 and newer");

// Blocks in host memory are left to a team of this many thread blocks: enough to keep the link
// busy, and more would only queue up at it while the others finish what is in device memory. One
// block there takes the time of about kHostCost in device memory.
constexpr int64_t kHostTeam = 48;
constexpr int64_t kHostCost = 10;

// A warp takes up to kMaxGroup blocks in a row, whose scales it reads and writes at once, a line of
// 128 bytes: alone, they would cost as much of the link as half of the codes. Such groups start at
// multiples of their size, in the order of the arena, so that none lies across the border of two
// chunks.
static_assert(kMaxGroup == kWarpSize / 2);

// What one warp works on: blocks [begin, end) in the order of the arena, of those the groups first,
// first + stride, ...
struct Share {
  int64_t begin, end, first, stride;
  int group;
};

// Deals out the blocks of a launch, of which those before `resident_end` are in device memory.
__device__ Share MyShare(int64_t begin, int64_t resident_end, int64_t end) {
  const int64_t num_hosted = end - resident_end, num_resident = resident_end - begin;
  int64_t team = gridDim.x, rank = blockIdx.x;
  Share share{begin, end, 0, 0, kMaxGroup};
  if (num_hosted > 0 && gridDim.x > 1) {
    const int64_t fair =
        gridDim.x * kHostCost * num_hosted / (kHostCost * num_hosted + num_resident);
    const int64_t most = min(kHostTeam, int64_t{gridDim.x} - (num_resident == 0 ? 0 : 1));
    const int64_t host_team = min(max(fair, int64_t{1}), most);
    if (rank < host_team) {
      share.begin = resident_end;
      team = host_team;
    } else {
      share.end = resident_end;
      team -= host_team;
      rank -= host_team;
    }
  }
  // Smaller groups where that many would leave warps without work.
  const int64_t warps = team * kWarps;
  while (share.group > 1 && share.end - share.begin < 4 * share.group * warps) share.group /= 2;
  share.first = share.begin / share.group + rank * kWarps + threadIdx.x / kWarpSize;
  share.stride = warps;
  return share;
}

// Directions on entry, updates on return. `source` and `target`: the residuals of the lane. Null
// where there are none; `source` also for a fresh state.
__device__ void StepParams(const ParamStep& step, const Leaf& leaf, int64_t start, int count,
                           const uint8_t* source, uint8_t* target, float (&values)[kLane]) {
  alignas(16) float params[kLane];
  Load(leaf.params, leaf.param_dtype, start, count, params);
  constexpr uint32_t kZeros = kZeroResidual * 0x01010101u;
  uint2 residuals{kZeros, kZeros};
  if (source != nullptr) residuals = *reinterpret_cast<const uint2*>(source);
  UpdateParams<kLane>(step, leaf, start, params, reinterpret_cast<uint8_t (&)[kLane]>(residuals),
                      values);
  if (target != nullptr) *reinterpret_cast<uint2*>(target) = residuals;
}

// Steps a lane's part of a block. The `dynamic` code needs its tables in shared memory, the `ratio`
// code the place of the lane; each kernel has registers for one of them.
template <Codec k8Bit>
struct Stepper;

template <>
struct Stepper<Codec::kDynamic> {
  static constexpr uint8_t kZeros[2] = {kZeroMu, kZeroNu};
  struct Shared {
    Maps maps;
  };
  static_assert(sizeof(Shared) % sizeof(float) == 0);

  __device__ static void Fill(Shared& shared) {
    for (int i = threadIdx.x; i < static_cast<int>(sizeof(Maps) / sizeof(float)); i += kThreads) {
      reinterpret_cast<float*>(&shared.maps)[i] = reinterpret_cast<const float*>(&kMaps)[i];
    }
  }

  __device__ static void Step(const Shared& shared, const AdamStep& step, const Leaf&, int64_t,
                              float (&values)[kLane], uint8_t (&mu)[kLane], uint8_t (&nu)[kLane],
                              float& mu_scale, float& nu_scale) {
    StepDynamicBlock<kLane>(FastMath(), step, shared.maps, values, mu, nu, mu_scale, nu_scale,
                            Warp());
  }
};

template <>
struct Stepper<Codec::kRatio> {
  static constexpr uint8_t kZeros[2] = {kZeroRatio, kZeroRatio};
  struct Shared {};

  __device__ static void Fill(Shared&) {}

  __device__ static void Step(const Shared&, const AdamStep& step, const Leaf& leaf, int64_t start,
                              float (&values)[kLane], uint8_t (&mu)[kLane], uint8_t (&nu)[kLane],
                              float& mu_scale, float& nu_word) {
    StepRatioBlock<kLane>(FastMath(), step, RatioStart(leaf.key, start), values, mu, nu, mu_scale,
                          nu_word, Warp());
  }
};

// One warp per block of moments, striding over its share of the blocks of the launch.
template <Codec k8Bit, bool kTakesParams, int kLeaves>
__global__ void __launch_bounds__(kThreads, 3)
    StepKernel(const __grid_constant__ StepArgs<kLeaves> args) {
  __shared__ typename Stepper<k8Bit>::Shared shared;
  __shared__ AdamStep step;
  __shared__ ParamStep param_step;
  __shared__ const uint8_t* sources[kMaxSegments];
  __shared__ uint8_t* targets[kMaxSegments];
  Stepper<k8Bit>::Fill(shared);
  const ResolvedStep& resolved = *args.resolved;
  const bool accepted = resolved.accepted, is_fresh = resolved.source == nullptr;
  if (threadIdx.x == 0) step = resolved.step;
  if (kTakesParams && threadIdx.x == 0) param_step = resolved.params;
  ArenaExtent extent = args.extent;
  if (!kTakesParams) extent.has_residuals = false;  // known to the compiler
  for (int i = threadIdx.x; accepted && i < kMaxSegments; i += kThreads) {
    if (!is_fresh) sources[i] = resolved.source[i];
    targets[i] = resolved.target[i];
  }
  const int log2_chunks = resolved.log2_chunks;
  const int64_t end = args.work_before + args.num_work;
  const int64_t resident_end =
      accepted ? min(max(resolved.resident_blocks, args.work_before), end) : end;
  __syncthreads();

  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const Share share = MyShare(args.work_before, resident_end, end);
  for (int64_t first = share.first * share.group; first < share.end;
       first += share.stride * share.group) {
    int i = static_cast<int>(max(share.begin - first, int64_t{0}));
    const int num = static_cast<int>(min(share.end - first, int64_t{share.group}));
    // The lane's codes in the group's first block; those of block i are i * 256 bytes further on.
    // Lanes 2 i and 2 i + 1 have the scales of block i.
    QuantizedBlock<const uint8_t> source{};
    QuantizedBlock<uint8_t> target{};
    float scale = 0.0f;
    bool has_scale = false;
    if (accepted && first < extent.num_quantized_blocks) {
      const int64_t segment = extent.QuantizedChunk(first) >> log2_chunks;
      has_scale = lane / 2 >= i && lane / 2 < num && first + lane / 2 < extent.num_quantized_blocks;
      target = extent.LocateQuantized(targets[segment], first);
      if (!is_fresh) {
        source = extent.LocateQuantized(sources[segment], first);
        if (has_scale) scale = source.scales[lane];
      }
    }
    int64_t leaf_index = -1;
    while (i < num) {
      // A run of blocks of one leaf.
      const int64_t work = first + i - args.work_before;
      if (leaf_index < 0) leaf_index = FindLeaf(args.leaves, args.num_leaves, work);
      while (leaf_index + 1 < args.num_leaves && args.leaves[leaf_index + 1].first_work <= work) {
        ++leaf_index;
      }
      const Leaf& leaf = args.leaves[leaf_index];
      const int64_t in_leaf = work - leaf.first_work;
      const int64_t left_in_leaf = NumBlocks(leaf.size) - in_leaf;
      const int run_end = left_in_leaf < num - i ? i + static_cast<int>(left_in_leaf) : num;
      int64_t start = in_leaf * kBlockSize + lane * kLane;
#pragma unroll 1
      for (; i < run_end; ++i, start += kBlockSize) {
        const int64_t left = leaf.size - start;
        const int count = left < 0 ? 0 : (left < kLane ? static_cast<int>(left) : kLane);
        alignas(16) float values[kLane];
        if (!accepted) {
          // A refused step changes nothing: its update is zero.
#pragma unroll
          for (int k = 0; k < kLane; ++k) values[k] = 0.0f;
          Store(leaf, start, count, values);
          continue;
        }
        Load(leaf.grads, leaf.dtype, start, count, values);
        const int64_t block = leaf.first_block + (start - lane * kLane) / kBlockSize;
        if (Is8Bit(leaf.codec)) {
          const int offset = i * static_cast<int>(kBlockSize) + lane * kLane;
          constexpr uint32_t kZeroMus = Stepper<k8Bit>::kZeros[0] * 0x01010101u;
          constexpr uint32_t kZeroNus = Stepper<k8Bit>::kZeros[1] * 0x01010101u;
          uint2 mu{kZeroMus, kZeroMus}, nu{kZeroNus, kZeroNus};
          if (!is_fresh) {
            mu = *reinterpret_cast<const uint2*>(source.mu + offset);
            nu = *reinterpret_cast<const uint2*>(source.nu + offset);
          }
          float mu_scale = __shfl_sync(0xffffffffu, scale, 2 * i);
          float nu_scale = __shfl_sync(0xffffffffu, scale, 2 * i + 1);
          Stepper<k8Bit>::Step(shared, step, leaf, start, values,
                               reinterpret_cast<uint8_t (&)[kLane]>(mu),
                               reinterpret_cast<uint8_t (&)[kLane]>(nu), mu_scale, nu_scale);
          *reinterpret_cast<uint2*>(target.mu + offset) = mu;
          *reinterpret_cast<uint2*>(target.nu + offset) = nu;
          if (lane / 2 == i) scale = lane % 2 == 0 ? mu_scale : nu_scale;
        } else {
          const int64_t segment = extent.Float32Chunk(block) >> log2_chunks;
          alignas(16) float mu[kLane] = {}, nu[kLane] = {};
          if (!is_fresh) {
            const auto moments = extent.LocateFloat32(sources[segment], block);
            LoadFloats(moments.mu + lane * kLane, mu);
            LoadFloats(moments.nu + lane * kLane, nu);
          }
          StepFloat32Block<kLane>(FastMath(), step, values, mu, nu);
          const auto moments = extent.LocateFloat32(targets[segment], block);
          StoreFloats(mu, moments.mu + lane * kLane);
          StoreFloats(nu, moments.nu + lane * kLane);
        }
        if (kTakesParams) {
          const uint8_t* residuals = nullptr;
          uint8_t* new_residuals = nullptr;
          if (extent.has_residuals) {
            const int64_t offset = extent.ResidualOffset(leaf.codec, block) + lane * kLane;
            const int64_t segment = offset / kChunkBytes >> log2_chunks;
            if (!is_fresh) residuals = sources[segment] + offset;
            new_residuals = targets[segment] + offset;
          }
          StepParams(param_step, leaf, start, count, residuals, new_residuals, values);
        }
        Store(leaf, start, count, values);
      }
    }
    if (has_scale) target.scales[lane] = scale;
  }
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

template <int kLeaves>
void LaunchSteps(const CudaUpdate& update, int device, Stream stream) {
  // All 8-bit leaves of a state have the same codec.
  const bool is_ratio = std::any_of(update.leaves.begin(), update.leaves.end(),
                                    [](const Leaf& leaf) { return leaf.codec == Codec::kRatio; });
  constexpr Codec kDynamic = Codec::kDynamic, kRatio = Codec::kRatio;
  const auto kernel = is_ratio ? (update.takes_params ? StepKernel<kRatio, true, kLeaves>
                                                      : StepKernel<kRatio, false, kLeaves>)
                               : (update.takes_params ? StepKernel<kDynamic, true, kLeaves>
                                                      : StepKernel<kDynamic, false, kLeaves>);
  int num_multiprocessors = 0, blocks_per_multiprocessor = 0;
  CUDA_CHECK(cudaDeviceGetAttribute(&num_multiprocessors, cudaDevAttrMultiProcessorCount, device));
  CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks_per_multiprocessor, kernel,
                                                           kThreads, 0));
  const int64_t resident_blocks = int64_t{num_multiprocessors} * blocks_per_multiprocessor;

  const int64_t num_leaves = static_cast<int64_t>(update.leaves.size());
  for (int64_t begin = 0; begin < num_leaves; begin += kLeaves) {
    const int64_t end = std::min(begin + kLeaves, num_leaves);
    const int64_t first_work = update.leaves[begin].first_work;
    StepArgs<kLeaves> args{};
    args.num_leaves = end - begin;
    args.work_before = first_work;
    args.num_work =
        (end == num_leaves ? update.num_work : update.leaves[end].first_work) - first_work;
    args.extent = update.extent;
    args.resolved = update.resolved;
    for (int64_t i = begin; i < end; ++i) {
      args.leaves[i - begin] = update.leaves[i];
      args.leaves[i - begin].first_work -= first_work;
    }
    if (args.num_work == 0) continue;
    const int64_t blocks = std::min(resident_blocks, (args.num_work + kWarps - 1) / kWarps);
    kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(args);
    CUDA_CHECK(cudaGetLastError());
  }
}

}  // namespace

void LaunchUpdate(const CudaUpdate& update, int device, Stream stream) {
  ScopedDevice scope(device);
  ResolveKernel<<<1, kWarpSize, 0, stream>>>(
      {update.headers, update.num_headers, update.token, update.count, update.hyperparams,
       update.part, update.new_token, update.rejection, update.resolved, update.nesterov,
       update.bad_element, update.takes_params, update.fingerprint, update.extent});
  CUDA_CHECK(cudaGetLastError());
  if (update.leaves.size() <= kFewLeaves) {
    LaunchSteps<kFewLeaves>(update, device, stream);
  } else {
    LaunchSteps<kManyLeaves>(update, device, stream);
  }
}

}  // namespace paged_optax
