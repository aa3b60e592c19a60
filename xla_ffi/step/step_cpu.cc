// The loop over blocks, compiled for several instruction sets.
#include "step/step_cpu.h"

#include <cstring>

#include "base/cpu.h"
#include "step/lane_cpu.h"

namespace paged_optax {
namespace {

constexpr int kLane = kCpuLane;

// Fetches what will be needed soon while something else is computed: a block takes so many
// instructions that the processor does not see the loads of the next one in time.
PAGED_HD void Prefetch(const void* data, int64_t nbytes) {
  constexpr int64_t kLine = 64;
  for (int64_t i = 0; i < nbytes; i += kLine) {
    __builtin_prefetch(static_cast<const uint8_t*>(data) + i);
  }
}

// The block of a leaf that starts at element `start`, or what there is of it.
PAGED_HD void PrefetchBlock(const void* data, DType dtype, int64_t start, int64_t size) {
  const int64_t left = size - start, count = left < kBlockSize ? left : kBlockSize;
  if (count <= 0) return;
  Prefetch(static_cast<const uint8_t*>(data) + start * SizeOf(dtype), count * SizeOf(dtype));
}

// The codes of the block after the one at `place`, if they follow it.
template <class Rule, class Format>
PAGED_HD void PrefetchCodes(const CpuWork& work, const BlockPlace& place) {
  constexpr int64_t kBytes = kStateBytes<Format>;
  if (work.source == nullptr) return;
  for (int s = 0; s < kNumStates<Rule>; ++s) {
    Prefetch(work.source + place.codes + s * place.state_stride + kBytes, kBytes);
  }
}

// Not a part of RunBlocks, because it is the same for all rules and formats.
template <Output kOutput>
PAGED_CLONES void StepParams(const CpuWork& work, const ParamStep& step, const Leaf& leaf,
                             int64_t start, int count, int64_t residual_offset,
                             float (&values)[kLane]) {
  alignas(64) float params[kLane];
  alignas(64) uint8_t residuals[kLane];
  LoadBlock(leaf.params, leaf.param_dtype, start, count, params);
  const bool has_residuals = work.region.shape.residual_bytes != 0;
  if (has_residuals && work.source != nullptr) {
    std::memcpy(residuals, work.source + residual_offset, sizeof(residuals));
  } else {
    std::memset(residuals, kZeroResidual, sizeof(residuals));
  }
  UpdateParams<kOutput>(step, leaf, start, params, residuals, values);
  if (has_residuals) std::memcpy(work.target + residual_offset, residuals, sizeof(residuals));
}

template <class Rule, class Format>
PAGED_CLONES void RunBlocks(const StepOf<Rule>& step, const CpuWork& work, int64_t begin,
                            int64_t end) {
  alignas(64) float values[kLane];
  Lane<Rule, Format, kLane> lane;
  int64_t index = FindLeaf(work.leaves, work.num_leaves, begin);
  for (int64_t block = begin; block < end; ++block) {
    // Empty leaves own no blocks: pass over them too.
    while (index + 1 < work.num_leaves && work.leaves[index + 1].first_block <= block) ++index;
    const Leaf& leaf = work.leaves[index];
    const int64_t start = (block - leaf.first_block) * kBlockSize;
    const int64_t left = leaf.size - start;
    const int count = left < kLane ? static_cast<int>(left) : kLane;
    const BlockPlace place = work.region.Locate(block);
    LoadBlock(leaf.grads, leaf.dtype, start, count, values);
    PrefetchBlock(leaf.grads, leaf.dtype, start + kBlockSize, leaf.size);
    if (TakesParams(work.output)) {
      PrefetchBlock(leaf.params, leaf.param_dtype, start, leaf.size);
    }
    if (block + 1 < end) PrefetchCodes<Rule, Format>(work, place);
    LoadLane(work.source, place, lane);
    const int num_fresh = work.source == nullptr ? count : 0;
    StepBlock(IeeeMath(), step, kCpuTables<Format>, leaf.key, start, num_fresh, values, lane,
              WholeBlock());
    StoreLane(lane, place, work.target);
    if (work.output == Output::kUpdate) {
      StepParams<Output::kUpdate>(work, step.params, leaf, start, count, place.residuals, values);
    } else if (work.output == Output::kParams) {
      StepParams<Output::kParams>(work, step.params, leaf, start, count, place.residuals, values);
    }
    StoreBlock(leaf.results, leaf.result_dtype, start, count, values);
  }
}

template <class Rule, class Format>
void Run(const AnyStep& step, const CpuWork& work, int64_t begin, int64_t end) {
  ScopedIeeeMode mode;
  RunBlocks<Rule, Format>(reinterpret_cast<const StepOf<Rule>&>(step), work, begin, end);
}

}  // namespace

CpuStep FindCpuStep(const StepKind& kind, int8_t format) {
  CpuStep found = nullptr;
  Visit(Rules(), kind.rule, [&](auto rule) {
    using Rule = typename decltype(rule)::type::Arithmetic;
    if constexpr (!kIsAny<Rule>) {
      Visit(Formats(), format, [&](auto chosen) {
        using Format = typename decltype(chosen)::type;
        found = &Run<Rule, Format>;
      });
    }
  });
  return found;
}

AnyStep PrepareStep(const StepKind& kind, const float* hyperparams, int32_t count) {
  AnyStep any{};
  Visit(Rules(), kind.rule, [&](auto rule) {
    using Rule = typename decltype(rule)::type;
    const auto step = PrepareStep<Rule>(kind, hyperparams, count);
    std::memcpy(any.bytes, &step, sizeof(step));
  });
  return any;
}

}  // namespace paged_optax
