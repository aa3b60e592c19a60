// The step on the GPU: one kernel that checks the token and one that runs a warp per block of
// moments. Adds to step.h only the launch, the loads and the stores.
#include <algorithm>

#include "cuda_check.h"
#include "fast_math.h"
#include "memory.h"
#include "step_cuda.h"

namespace paged_optax {

// Overload of UpdateLane in step.h: the fast way, and the sure way if that was not exact.
template <int K>
__device__ __forceinline__ void UpdateLane(FastMath math, const AdamStep& step,
                                           const float (&nu)[K], float (&values)[K]) {
  float updates[K];
#pragma unroll
  for (int k = 0; k < K; ++k) updates[k] = Update(math, step, values[k], nu[k]);
  if (!math.is_exact) {
    UpdateLane(IeeeMath(), step, nu, values);
    return;
  }
#pragma unroll
  for (int k = 0; k < K; ++k) values[k] = updates[k];
}

namespace {

constexpr int kWarpSize = 32;
constexpr int kLane = static_cast<int>(kBlockSize) / kWarpSize;  // elements per thread
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
  Token* new_token;
  Rejection* rejection;
  ResolvedStep* resolved;
  bool nesterov;
  BadElement bad_element;
  bool takes_params;
  uint64_t layout;
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
  const Judgement judgement = Judge(header, token, args.layout);
  ResolvedStep& resolved = *args.resolved;
  const int32_t count = *args.count;
  const bool skipped = IsAccepted(judgement.verdict) && count < 0;
  resolved.accepted = IsAccepted(judgement.verdict) && !skipped;
  if (resolved.accepted) {
    resolved.step = MakeAdamStep(args.hyperparams, count, args.nesterov, args.bad_element);
    if (args.takes_params) resolved.params = MakeParamStep(args.hyperparams, count);
    resolved.source =
        judgement.verdict == Verdict::kFresh ? nullptr : header->bases[judgement.source];
    resolved.target = header->bases[judgement.target];
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
  report->layout = args.layout;
  __threadfence_system();
  report->verdict = judgement.verdict;
}

// Leaves travel to the kernel by value: nothing to stage, nothing to keep alive.
constexpr int kLeavesPerLaunch = 60;
struct StepArgs {
  Leaf leaves[kLeavesPerLaunch];
  int64_t num_leaves;
  int64_t num_work;
  ArenaExtent extent;
  const ResolvedStep* resolved;
};
static_assert(sizeof(StepArgs) <= 4096, "kernel parameters that every CUDA version accepts");

// XLA aligns buffers, and slices that it hands over; this is for the case that it does not.
__device__ bool IsAligned(const void* address) {
  return reinterpret_cast<uintptr_t>(address) % 16 == 0;
}

// All of a thread's floats at once; aligned.
__device__ void LoadFloats(const float* source, float (&values)[kLane]) {
#pragma unroll
  for (int k = 0; k < kLane; k += 4) {
    *reinterpret_cast<float4*>(&values[k]) = *reinterpret_cast<const float4*>(source + k);
  }
}

__device__ void StoreFloats(const float (&values)[kLane], float* target) {
#pragma unroll
  for (int k = 0; k < kLane; k += 4) {
    *reinterpret_cast<float4*>(target + k) = *reinterpret_cast<const float4*>(&values[k]);
  }
}

// Of `data`, `count` elements from `start` on, and zeros.
__device__ void Load(const void* data, DType dtype, int64_t start, int count,
                     float (&values)[kLane]) {
  if (dtype == DType::kFloat32) {
    const float* source = static_cast<const float*>(data) + start;
    if (count == kLane && IsAligned(source)) {
      LoadFloats(source, values);
      return;
    }
#pragma unroll
    for (int k = 0; k < kLane; ++k) values[k] = k < count ? source[k] : 0.0f;
    return;
  }
  const uint16_t* source = static_cast<const uint16_t*>(data) + start;
  uint4 packed = {0, 0, 0, 0};
  uint16_t* halves = reinterpret_cast<uint16_t*>(&packed);
  if (count == kLane && IsAligned(source)) {
    packed = *reinterpret_cast<const uint4*>(source);
  } else {
#pragma unroll
    for (int k = 0; k < kLane; ++k) halves[k] = k < count ? source[k] : uint16_t{0};
  }
  if (dtype == DType::kBFloat16) {
#pragma unroll
    for (int k = 0; k < kLane; ++k) values[k] = FromBFloat16(halves[k]);
  } else {
#pragma unroll
    for (int k = 0; k < kLane; ++k) values[k] = FromFloat16(halves[k]);
  }
}

__device__ void Store(const Leaf& leaf, int64_t start, int count, const float (&values)[kLane]) {
  if (leaf.dtype == DType::kFloat32) {
    float* target = static_cast<float*>(leaf.updates) + start;
    if (count == kLane && IsAligned(target)) {
      StoreFloats(values, target);
      return;
    }
#pragma unroll
    for (int k = 0; k < kLane; ++k) {
      if (k < count) target[k] = values[k];
    }
    return;
  }
  uint4 packed;
  uint16_t* halves = reinterpret_cast<uint16_t*>(&packed);
  if (leaf.dtype == DType::kBFloat16) {
#pragma unroll
    for (int k = 0; k < kLane; ++k) halves[k] = ToBFloat16(values[k]);
  } else {
#pragma unroll
    for (int k = 0; k < kLane; ++k) halves[k] = ToFloat16(values[k]);
  }
  uint16_t* target = static_cast<uint16_t*>(leaf.updates) + start;
  if (count == kLane && IsAligned(target)) {
    *reinterpret_cast<uint4*>(target) = packed;
    return;
  }
#pragma unroll
  for (int k = 0; k < kLane; ++k) {
    if (k < count) target[k] = halves[k];
  }
}

__device__ uint32_t WarpMax(uint32_t lane_max) { return __reduce_max_sync(0xffffffffu, lane_max); }

// Directions on entry, updates on return. `source` and `target`: the residuals of the lane, if the
// arena has any; `source` is null for those of a fresh state.
__device__ void StepParams(const ParamStep& step, const Leaf& leaf, int64_t start, int count,
                           bool has_residuals, const uint8_t* source, uint8_t* target,
                           float (&values)[kLane]) {
  alignas(16) float params[kLane];
  Load(leaf.params, leaf.param_dtype, start, count, params);
  constexpr uint32_t kZeros = kZeroResidual * 0x01010101u;
  uint2 residuals{kZeros, kZeros};
  if (has_residuals && source != nullptr) residuals = *reinterpret_cast<const uint2*>(source);
  UpdateParams<kLane>(step, leaf, start, params, reinterpret_cast<uint8_t (&)[kLane]>(residuals),
                      values);
  if (has_residuals) *reinterpret_cast<uint2*>(target) = residuals;
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
                            WarpMax);
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
    StepRatioBlock<kLane>(FastMath(), step, RatioKey(leaf.key, start), static_cast<uint32_t>(start),
                          values, mu, nu, mu_scale, nu_word, WarpMax);
  }
};

// One warp per block of moments, striding over the blocks of the launch.
template <Codec k8Bit, bool kTakesParams>
__global__ void __launch_bounds__(kThreads) StepKernel(const __grid_constant__ StepArgs args) {
  __shared__ typename Stepper<k8Bit>::Shared shared;
  __shared__ AdamStep step;
  __shared__ ParamStep param_step;
  Stepper<k8Bit>::Fill(shared);
  if (threadIdx.x == 0) step = args.resolved->step;
  if (kTakesParams && threadIdx.x == 0) param_step = args.resolved->params;
  const bool accepted = args.resolved->accepted;
  const uint8_t* source_base = args.resolved->source;
  uint8_t* target_base = args.resolved->target;
  ArenaExtent extent = args.extent;
  if (!kTakesParams) extent.has_residuals = false;  // known to the compiler
  __syncthreads();

  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarpSize;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t work = first; work < args.num_work; work += stride) {
    const Leaf& leaf = args.leaves[FindLeaf(args.leaves, args.num_leaves, work)];
    const int64_t in_leaf = work - leaf.first_work;
    const int64_t start = in_leaf * kBlockSize + lane * kLane;
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
    const uint8_t* source_residuals = nullptr;
    uint8_t* target_residuals;
    const int64_t block = leaf.first_block + in_leaf;
    if (Is8Bit(leaf.codec)) {
      constexpr uint32_t kZeroMus = Stepper<k8Bit>::kZeros[0] * 0x01010101u;
      constexpr uint32_t kZeroNus = Stepper<k8Bit>::kZeros[1] * 0x01010101u;
      uint2 mu{kZeroMus, kZeroMus}, nu{kZeroNus, kZeroNus};
      float mu_scale = 0.0f, nu_scale = 0.0f;
      if (source_base != nullptr) {
        const auto source = extent.LocateDynamic(source_base, block);
        mu = *reinterpret_cast<const uint2*>(source.mu + lane * kLane);
        nu = *reinterpret_cast<const uint2*>(source.nu + lane * kLane);
        mu_scale = *source.mu_scale;
        nu_scale = *source.nu_scale;
        source_residuals = source.residuals + lane * kLane;
      }
      Stepper<k8Bit>::Step(shared, step, leaf, start, values,
                           reinterpret_cast<uint8_t (&)[kLane]>(mu),
                           reinterpret_cast<uint8_t (&)[kLane]>(nu), mu_scale, nu_scale);
      const auto target = extent.LocateDynamic(target_base, block);
      *reinterpret_cast<uint2*>(target.mu + lane * kLane) = mu;
      *reinterpret_cast<uint2*>(target.nu + lane * kLane) = nu;
      if (lane == 0) {
        *target.mu_scale = mu_scale;
        *target.nu_scale = nu_scale;
      }
      target_residuals = target.residuals + lane * kLane;
    } else {
      alignas(16) float mu[kLane] = {}, nu[kLane] = {};
      if (source_base != nullptr) {
        const auto source = extent.LocateFloat32(source_base, block);
        LoadFloats(source.mu + lane * kLane, mu);
        LoadFloats(source.nu + lane * kLane, nu);
        source_residuals = source.residuals + lane * kLane;
      }
      StepFloat32Block<kLane>(FastMath(), step, values, mu, nu);
      const auto target = extent.LocateFloat32(target_base, block);
      StoreFloats(mu, target.mu + lane * kLane);
      StoreFloats(nu, target.nu + lane * kLane);
      target_residuals = target.residuals + lane * kLane;
    }
    if (kTakesParams) {
      StepParams(param_step, leaf, start, count, extent.has_residuals, source_residuals,
                 target_residuals, values);
    }
    Store(leaf, start, count, values);
  }
}

// Counts arguments, out of all 2^32, for which FastMath claims to be exact and is not.
__global__ void CountInexactKernel(unsigned long long* count) {
  const uint64_t stride = static_cast<uint64_t>(gridDim.x) * blockDim.x;
  for (uint64_t bits = blockIdx.x * blockDim.x + threadIdx.x; bits < uint64_t{1} << 32;
       bits += stride) {
    const float x = FloatOf(static_cast<uint32_t>(bits));
    FastMath root, reciprocal;
    const bool good_root = BitsOf(root.Sqrt(x)) == BitsOf(sqrtf(x));
    const bool good_reciprocal = BitsOf(reciprocal.Reciprocal(x)) == BitsOf(1.0f / x);
    if ((root.is_exact && !good_root && BitsOf(x) != 0x80000000u) ||
        (reciprocal.is_exact && !good_reciprocal)) {
      atomicAdd(count, 1ull);
    }
  }
}

__global__ void WriteTokenKernel(Token token, Token* destination) { *destination = token; }

}  // namespace

void LaunchWriteToken(Token token, Token* destination, int device, void* stream) {
  ScopedDevice scope(device);
  WriteTokenKernel<<<1, 1, 0, static_cast<cudaStream_t>(stream)>>>(token, destination);
  CUDA_CHECK(cudaGetLastError());
}

int64_t CountInexact(int device) {
  ScopedDevice scope(device);
  DeviceBuffer count(sizeof(int64_t));
  CountInexactKernel<<<1024, 256>>>(static_cast<unsigned long long*>(count.data()));
  CUDA_CHECK(cudaGetLastError());
  int64_t result;
  CUDA_CHECK(cudaMemcpy(&result, count.data(), sizeof(result), cudaMemcpyDeviceToHost));
  return result;
}

void LaunchUpdate(const CudaUpdate& update, int device, void* stream) {
  const cudaStream_t cuda_stream = static_cast<cudaStream_t>(stream);
  ScopedDevice scope(device);
  ResolveKernel<<<1, kWarpSize, 0, cuda_stream>>>(
      {update.headers, update.num_headers, update.token, update.count, update.hyperparams,
       update.new_token, update.rejection, update.resolved, update.nesterov, update.bad_element,
       update.takes_params, update.layout});
  CUDA_CHECK(cudaGetLastError());

  // All 8-bit leaves of a state have the same codec.
  const bool is_ratio = std::any_of(update.leaves.begin(), update.leaves.end(),
                                    [](const Leaf& leaf) { return leaf.codec == Codec::kRatio; });
  constexpr Codec kDynamic = Codec::kDynamic, kRatio = Codec::kRatio;
  const auto kernel =
      is_ratio ? (update.takes_params ? StepKernel<kRatio, true> : StepKernel<kRatio, false>)
               : (update.takes_params ? StepKernel<kDynamic, true> : StepKernel<kDynamic, false>);
  int num_multiprocessors = 0, blocks_per_multiprocessor = 0;
  CUDA_CHECK(cudaDeviceGetAttribute(&num_multiprocessors, cudaDevAttrMultiProcessorCount, device));
  CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks_per_multiprocessor, kernel,
                                                           kThreads, 0));
  const int64_t resident_blocks = int64_t{num_multiprocessors} * blocks_per_multiprocessor;

  const int64_t num_leaves = static_cast<int64_t>(update.leaves.size());
  for (int64_t begin = 0; begin < num_leaves; begin += kLeavesPerLaunch) {
    const int64_t end = std::min(begin + kLeavesPerLaunch, num_leaves);
    const int64_t first_work = update.leaves[begin].first_work;
    StepArgs args{};
    args.num_leaves = end - begin;
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
    kernel<<<static_cast<unsigned>(blocks), kThreads, 0, cuda_stream>>>(args);
    CUDA_CHECK(cudaGetLastError());
  }
}

}  // namespace paged_optax
