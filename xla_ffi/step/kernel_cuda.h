// The step on the GPU: one warp steps a block of a region. Says which warp takes which blocks.
// Included by the .cu files, each of which compiles some of the kernels.
#pragma once

#include "base/fast_math.h"
#include "step/fetch_cuda.h"
#include "step/step_cuda.h"

namespace paged_optax {

// Blocks in host memory are left to a team of this many thread blocks: enough to keep the link
// busy. More would only queue up at it while the others finish what is in device memory. One block
// there takes the time of about kHostCost blocks in device memory.
inline constexpr int64_t kHostTeam = 48;
inline constexpr int64_t kHostCost = 10;

// A warp takes a group of blocks in a row. Its threads hold the group's words, which they read and
// write at once, as one line of up to 128 bytes: one by one, the words would use as much of the
// link as half of the codes. Groups start at multiples of their size, so that none lies across the
// border of two chunks.
constexpr int LargestGroup(int num_words) {
  int group = 1;
  while (2 * group * (num_words == 0 ? 2 : num_words) <= kWarpSize) group *= 2;
  return group;
}

template <class Rule, class Format>
inline constexpr int kGroup = LargestGroup(kNumWords<Rule, Format>);

// What one warp works on: of blocks [begin, end), the groups first, first + stride, ...
struct Share {
  int64_t begin, end, first, stride;
  int group;
};

// Deals out the blocks of a region. Those before `resident_end` are in device memory.
template <int kLargest>
__device__ Share MyShare(int64_t resident_end, int64_t end) {
  const int64_t num_hosted = end - resident_end, num_resident = resident_end;
  int64_t team = gridDim.x, rank = blockIdx.x;
  Share share{0, end, 0, 0, kLargest};
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

// Kernels that fetch ahead. Those of other formats are rarely used, and would need too much shared
// memory.
template <class Format>
inline constexpr bool kFetchesAhead = Format::kStoresRatios;

// What the threads of a warp have in common: registers are short.
template <class Rule, class Format, int kOutput>
struct SharedByWarp {
  using Fetched = FetchedBlock<kOutput != static_cast<int>(Output::kDirection), kNumStates<Rule>>;
  std::conditional_t<kFetchesAhead<Format>, Fetched, NoTables> fetched[2];
  Leaf leaf;  // that it works on
  BlockBytes block_bytes;
};

// What the threads of a block have in common.
template <class Rule, class Format, int kOutput>
struct Shared {
  SharedByWarp<Rule, Format, kOutput> warps[kWarps];
  typename Format::template Tables<uint8_t> tables;
  StepOf<Rule> step;
  const uint8_t* sources[kMaxSegments];  // bases of the segments
  uint8_t* targets[kMaxSegments];
};

template <class Rule, class Format, int kOutput>
__device__ __forceinline__ void Fill(const ResolvedStep& resolved,
                                     Shared<Rule, Format, kOutput>& shared) {
  FillTables<Format>(shared.tables);
  if (threadIdx.x == 0) shared.step = reinterpret_cast<const StepOf<Rule>&>(resolved.step);
  for (int i = threadIdx.x; resolved.accepted && i < kMaxSegments; i += kThreads) {
    if (resolved.source != nullptr) shared.sources[i] = resolved.source[i];
    shared.targets[i] = resolved.target[i];
  }
  __syncthreads();
}

// A group of blocks, as one thread sees it. `source` (nullptr for a fresh state) and `target` are
// where the lane's codes lie in the group's first block; block i is i blocks further on. Everything
// else lies at a distance of 32 bits, since all is in one chunk. Thread i * kNumWords + w holds
// word w of block i.
struct Group {
  const uint8_t* source = nullptr;
  uint8_t* target = nullptr;
  int stride;  // from a state to the next
  int to_residuals, to_words;
  uint32_t word = 0;
  bool has_word = false;
};

// Blocks [begin, end) of the group that starts with block `first` of the region.
template <class Rule, class Format, int kOutput>
__device__ __forceinline__ Group OpenGroup(const Shared<Rule, Format, kOutput>& shared,
                                           const Region& region, const ResolvedStep& resolved,
                                           int64_t first, int begin, int end, int thread) {
  constexpr int kWords = kNumWords<Rule, Format>;
  const BlockPlace place = region.Locate(first);
  const int lane = thread * kLaneBytes<Format>;
  Group group;
  group.stride = static_cast<int>(place.state_stride);
  group.to_residuals = static_cast<int>(place.residuals - place.codes) + thread * kLane - lane;
  group.to_words = static_cast<int>(place.words - place.codes) + thread * 4 - lane;
  const int64_t segment = region.Chunk(first) >> resolved.log2_chunks;
  const bool is_fresh = resolved.source == nullptr;
  group.target = shared.targets[segment] + place.codes + lane;
  if (!is_fresh) group.source = shared.sources[segment] + place.codes + lane;
  if constexpr (kWords > 0) {
    group.has_word = thread >= begin * kWords && thread < end * kWords;
    if (group.has_word && !is_fresh) {
      group.word = *reinterpret_cast<const uint32_t*>(group.source + group.to_words);
    }
  }
  return group;
}

template <class Rule, class Format>
__device__ __forceinline__ void LoadCodesOf(const Group& group, int i, int thread,
                                            Lane<Rule, Format, kLane>& lane) {
#pragma unroll
  for (int s = 0; s < kNumStates<Rule>; ++s) {
    if (group.source == nullptr) {
#pragma unroll
      for (int k = 0; k < kLane; ++k) {
        lane.codes[s][k] = Format::template Zero<Rule>(s);
      }
    } else {
      LoadLaneCodes<Format>(group.source + i * kStateBytes<Format> + s * group.stride, thread,
                            lane.codes[s]);
    }
  }
}

template <class Rule, class Format>
__device__ __forceinline__ void TakeWords(const Group& group, int i,
                                          Lane<Rule, Format, kLane>& lane) {
  constexpr int kWords = kNumWords<Rule, Format>;
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
    lane.words[w] = __shfl_sync(0xffffffffu, group.word, i * kWords + w);
  }
}

template <class Rule, class Format>
__device__ __forceinline__ void StoreLane(const Lane<Rule, Format, kLane>& lane, int i, int thread,
                                          Group& group) {
  constexpr int kWords = kNumWords<Rule, Format>;
#pragma unroll
  for (int s = 0; s < kNumStates<Rule>; ++s) {
    StoreLaneCodes<Format>(lane.codes[s], thread,
                           group.target + i * kStateBytes<Format> + s * group.stride);
  }
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
    group.word = thread == i * kWords + w ? lane.words[w] : group.word;
  }
}

// In place of an Output: a kernel that does whatever its call says. The others do one thing only.
inline constexpr int kAnyOutput = -1;

// Kernels for one output each run as fast as they can, and take long to compile. So they are only
// made of what many train with.
template <class Format>
inline constexpr bool kHasOwnKernels = std::is_same_v<Format, Ratio>;

// A refused step changes nothing: its update is zero, and parameters stay.
__device__ inline void StoreRefused(Output output, const Leaf& leaf, int64_t start, int count) {
  alignas(16) float values[kLane] = {};
  if (output == Output::kParams) {
    if (leaf.results == leaf.params) return;
    Load(leaf.params, leaf.param_dtype, start, count, values);
  }
  Store(leaf, start, count, values);
}

// How many of the `num` blocks from element `start` of a leaf on can be fetched ahead: those that
// are whole, if the leaf's arrays are aligned.
__device__ inline int NumFetched(const Leaf& leaf, int64_t start, int num) {
  const int64_t num_whole = (leaf.size - start) / kBlockSize;
  const bool is_aligned =
      IsAligned(leaf.grads) && IsAligned(leaf.params) && IsAligned(leaf.results);
  return is_aligned ? static_cast<int>(min(num_whole, int64_t{num})) : 0;
}

// The thread's elements of a leaf from `start` on: at most kLane.
__device__ inline int NumElements(const Leaf& leaf, int64_t start) {
  const int64_t left = leaf.size - start;
  return left < 0 ? 0 : (left < kLane ? static_cast<int>(left) : kLane);
}

// The types of a leaf's arrays. All threads of a warp have the same ones anyway. From a reduction
// the compiler knows it: branches on them take no instructions that bring the threads together
// again.
struct DTypes {
  DType grads, params, results;
};

__device__ inline DTypes DTypesOf(const Leaf& leaf) {
  const uint32_t all =
      __reduce_max_sync(0xffffffffu, static_cast<uint32_t>(leaf.dtype) |
                                         static_cast<uint32_t>(leaf.param_dtype) << 8 |
                                         static_cast<uint32_t>(leaf.result_dtype) << 16);
  return {static_cast<DType>(all & 0xff), static_cast<DType>(all >> 8 & 0xff),
          static_cast<DType>(all >> 16)};
}

// Blocks [i, end) of a group, all of `leaf`, of which the thread has the elements from `start` on.
template <class Rule, class Format, int kOutput>
__device__ __forceinline__ void StepRun(Shared<Rule, Format, kOutput>& shared,
                                        SharedByWarp<Rule, Format, kOutput>& by_warp, Output output,
                                        bool has_residuals, int64_t start, int end, int thread,
                                        int& i, Group& group) {
  const Leaf& leaf = by_warp.leaf;
  constexpr bool kAhead = kFetchesAhead<Format>;
  constexpr bool kHasParams = kOutput != static_cast<int>(Output::kDirection);
  if (group.target == nullptr) {
#pragma unroll 1
    for (; i < end; ++i, start += kBlockSize) {
      StoreRefused(output, leaf, start, NumElements(leaf, start));
    }
    return;
  }
  auto& fetched = by_warp.fetched;
  const DTypes dtypes = DTypesOf(leaf);
  const BlockBytes& bytes = by_warp.block_bytes;
  int fetched_end = i;
  const uint8_t *grads = nullptr, *params = nullptr;
  // Of block `next`, into what the block before the last was read from: that has been used.
  const auto fetch = [&](int next) {
    if constexpr (kAhead) {
      auto& stage = fetched[static_cast<unsigned>(next) % 2];
      const BlockBytes of_block = bytes;  // read before the first copy
      Fetch(grads, of_block.grads, next, thread, stage.grads);
      if constexpr (kHasParams) {
        if (TakesParams(output)) Fetch(params, of_block.params, next, thread, stage.params);
      }
      const uint8_t* codes = group.source + next * kStateBytes<Format>;
#pragma unroll
      for (int s = 0; s < kNumStates<Rule>; ++s) {
        CopyCodesAhead<Format>(codes + s * group.stride, thread, stage.codes[thread][s]);
      }
      if constexpr (kHasParams) {
        // Residuals, where parameters of 16 bits leave room.
        if (TakesParams(output) && has_residuals && !IsFloat32(of_block.params)) {
          CopyAhead<kLane>(group.source + group.to_residuals + next * int{kResidualBytes},
                           stage.params.halves[1][thread]);
        }
      }
    }
  };
  if constexpr (kAhead) {
    if (group.source != nullptr) {
      fetched_end += NumFetched(leaf, start - thread * kLane, end - i);
      grads = FirstOf(leaf.grads, leaf.dtype, start, i);
      if constexpr (kHasParams) params = FirstOf(leaf.params, leaf.param_dtype, start, i);
    }
    if (i < fetched_end) fetch(i);
    EndBatch();
  }
#pragma unroll 1
  for (; i < end; ++i, start += kBlockSize) {
    alignas(16) float values[kLane];
    Lane<Rule, Format, kLane> lane;
    const auto& stage = fetched[static_cast<unsigned>(i) % 2];
    const bool is_fetched = kAhead && i < fetched_end;
    if constexpr (kAhead) {
      if (i + 1 < fetched_end) fetch(i + 1);
      EndBatch();
      WaitForBatches();
      if (is_fetched) {
        Take(stage.grads, dtypes.grads, thread, values);
#pragma unroll
        for (int s = 0; s < kNumStates<Rule>; ++s) {
          TakeCodes<Format>(stage.codes[thread][s], thread, lane.codes[s]);
        }
      }
    }
    const int count = is_fetched ? kLane : NumElements(leaf, start);
    if (!is_fetched) {
      Load(leaf.grads, leaf.dtype, start, count, values);
      LoadCodesOf(group, i, thread, lane);
    }
    TakeWords(group, i, lane);
    const int num_fresh = group.source == nullptr ? count : 0;
    StepBlock(FastMath(), shared.step, shared.tables, leaf.key, start, num_fresh, values, lane,
              Warp());
    StoreLane(lane, i, thread, group);
    if constexpr (kHasParams) {
      if (TakesParams(output)) {
        float old[kLane];
        if constexpr (kAhead) {
          if (is_fetched) Take(stage.params, dtypes.params, thread, old);
        }
        if (!is_fetched) Load(leaf.params, leaf.param_dtype, start, count, old);
        uint2 residuals{};  // where there are none, nobody looks at them
        const int to_residuals = group.to_residuals + i * static_cast<int>(kResidualBytes);
        if (has_residuals) {
          constexpr uint32_t kZeros = kZeroResidual * 0x01010101u;
          const uint8_t* source = group.source + to_residuals;
          if constexpr (kAhead) {
            const bool is_here = is_fetched && leaf.param_dtype != DType::kFloat32;
            if (is_here) source = stage.params.halves[1][thread];
          }
          residuals = group.source == nullptr ? uint2{kZeros, kZeros}
                                              : *reinterpret_cast<const uint2*>(source);
        }
        auto& new_residuals = reinterpret_cast<uint8_t (&)[kLane]>(residuals);
        const ParamStep& step = shared.step.params;
        if (output == Output::kUpdate) {
          UpdateParams<Output::kUpdate>(step, leaf, start, old, new_residuals, values);
        } else {
          UpdateParams<Output::kParams>(step, leaf, start, old, new_residuals, values);
        }
        if (has_residuals) {
          *reinterpret_cast<uint2*>(group.target + to_residuals) = residuals;
        }
      }
    }
    if (is_fetched) {
      StoreAll(values, leaf.results, dtypes.results, start);
    } else {
      Store(leaf, start, count, values);
    }
  }
}

// One warp copies a leaf to where its threads read it.
__device__ __forceinline__ void CopyLeaf(const Leaf& source, int thread, Leaf& leaf,
                                         BlockBytes& block_bytes) {
  __syncwarp();
  if (thread < static_cast<int>(sizeof(Leaf) / sizeof(uint64_t))) {
    reinterpret_cast<uint64_t*>(&leaf)[thread] = reinterpret_cast<const uint64_t*>(&source)[thread];
  }
  if (thread == 0) block_bytes = BlockBytesOf(source);
  __syncwarp();
}

// Thread blocks that a multiprocessor has at once: three leave a thread 80 registers. Three states
// need a few more where there are parameters or copies ahead as well, and so does a mean that new
// parameters are made of.
template <class Rule, class Format, int kOutput>
inline constexpr bool kNeedsRegisters = kNumStates<Rule> > 2
                                            ? kFetchesAhead<Format> ||
                                                  kOutput > static_cast<int>(Output::kDirection)
                                            : std::is_same_v<Rule, Centered>&& kOutput ==
                                                  static_cast<int>(Output::kParams);

template <class Rule, class Format, int kOutput>
inline constexpr int kMinBlocks = kNeedsRegisters<Rule, Format, kOutput> ? 2 : 3;

template <class Rule, class Format, int kOutput>
__global__ void __launch_bounds__(kThreads, (kMinBlocks<Rule, Format, kOutput>))
    StepKernel(const __grid_constant__ RegionStep args) {
  __shared__ Shared<Rule, Format, kOutput> shared;
  const ResolvedStep& resolved = *args.resolved;
  Fill(resolved, shared);
  const bool accepted = resolved.accepted;
  const Output output = kOutput == kAnyOutput ? args.output : static_cast<Output>(kOutput);
  const bool has_residuals = args.region.shape.residual_bytes != 0;
  Region region = args.region;
  // Constants, so that the compiler can fold them.
  region.shape = {kNumStates<Rule>, kStateBytes<Format>, kNumWords<Rule, Format>,
                  TakesParams(output) ? args.region.shape.residual_bytes : 0};
  const int64_t end = region.num_blocks;
  const int64_t resident_end = accepted ? min(resolved.resident_blocks[args.format], end) : end;
  const int thread = static_cast<int>(threadIdx.x) % kWarpSize;
  auto& by_warp = shared.warps[threadIdx.x / kWarpSize];
  const Leaf& leaf = by_warp.leaf;
  const Share share = MyShare<kGroup<Rule, Format>>(resident_end, end);
  for (int64_t first = share.first * share.group; first < share.end;
       first += share.stride * share.group) {
    int i = static_cast<int>(max(share.begin - first, int64_t{0}));
    const int num = static_cast<int>(min(share.end - first, int64_t{share.group}));
    Group group;
    if (accepted) group = OpenGroup(shared, region, resolved, first, i, num, thread);
    int leaf_index = static_cast<int>(FindLeaf(args.leaves, args.num_leaves, first + i));
    while (i < num) {
      // A run of blocks of one leaf. Empty leaves own no blocks: pass over them too.
      const int64_t block = first + i;
      while (leaf_index + 1 < args.num_leaves && args.leaves[leaf_index + 1].first_block <= block) {
        ++leaf_index;
      }
      CopyLeaf(args.leaves[leaf_index], thread, by_warp.leaf, by_warp.block_bytes);
      const int64_t in_leaf = block - leaf.first_block;
      const int64_t left_in_leaf = NumBlocks(leaf.size) - in_leaf;
      const int run_end = left_in_leaf < num - i ? i + static_cast<int>(left_in_leaf) : num;
      StepRun(shared, by_warp, output, has_residuals, in_leaf * kBlockSize + thread * kLane,
              run_end, thread, i, group);
    }
    if (group.has_word) *reinterpret_cast<uint32_t*>(group.target + group.to_words) = group.word;
  }
}

}  // namespace paged_optax
