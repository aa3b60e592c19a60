// The step on the CPU: a loop over blocks, compiled for several instruction sets. Called from the
// CPU handler in handlers.cc, on many threads with disjoint ranges.
#include <cstring>

#include "step/step.h"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace paged_optax {
namespace {

constexpr DynamicMaps<int32_t> kMaps = MakeDynamicMaps<int32_t>();

// XLA runs its threads with subnormal numbers flushed to zero, some of them; the arithmetic here is
// defined with them. Restores the thread's mode on exit.
class ScopedIeeeMode {
 public:
#if defined(__x86_64__)
  ScopedIeeeMode() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ & ~0x8040u); }  // FTZ, DAZ
  ~ScopedIeeeMode() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
  ScopedIeeeMode() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" ::"r"(saved_ & ~(uint64_t{1} << 24)));  // FZ
  }
  ~ScopedIeeeMode() { asm volatile("msr fpcr, %0" ::"r"(saved_)); }

 private:
  uint64_t saved_;
#endif
};

// One clone per instruction set, chosen at load time. Results do not depend on the clone: every
// operation is a single IEEE rounding.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__)
#define PAGED_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define PAGED_CLONES
#endif

constexpr int kLane = static_cast<int>(kBlockSize);

PAGED_HD void Load(const void* source, DType dtype, int64_t start, int count,
                   float (&values)[kLane]) {
  if (count < kLane) std::memset(values, 0, sizeof(values));
  if (dtype == DType::kFloat32) {
    std::memcpy(values, static_cast<const float*>(source) + start, count * sizeof(float));
    return;
  }
  const uint16_t* halves = static_cast<const uint16_t*>(source) + start;
  if (dtype == DType::kBFloat16) {
    for (int k = 0; k < count; ++k) values[k] = FromBFloat16(halves[k]);
  } else {
    for (int k = 0; k < count; ++k) values[k] = FromFloat16(halves[k]);
  }
}

PAGED_HD void Store(const Leaf& leaf, int64_t start, int count, const float (&values)[kLane]) {
  if (leaf.dtype == DType::kFloat32) {
    std::memcpy(static_cast<float*>(leaf.updates) + start, values, count * sizeof(float));
    return;
  }
  uint16_t* halves = static_cast<uint16_t*>(leaf.updates) + start;
  if (leaf.dtype == DType::kBFloat16) {
    for (int k = 0; k < count; ++k) halves[k] = ToBFloat16(values[k]);
  } else {
    for (int k = 0; k < count; ++k) halves[k] = ToFloat16(values[k]);
  }
}

PAGED_HD void StepParams(const Work& work, const Leaf& leaf, int64_t start, int count,
                         int64_t block, float (&values)[kLane]) {
  alignas(64) float params[kLane];
  alignas(64) uint8_t residuals[kLane];
  Load(leaf.params, leaf.param_dtype, start, count, params);
  const bool has_residuals = work.extent.has_residuals;
  const int64_t offset = work.extent.ResidualOffset(leaf.codec, block);
  if (has_residuals && work.source != nullptr) {
    std::memcpy(residuals, work.source + offset, sizeof(residuals));
  } else {
    std::memset(residuals, kZeroResidual, sizeof(residuals));
  }
  UpdateParams<kLane>(*work.params, leaf, start, params, residuals, values);
  if (has_residuals) std::memcpy(work.target + offset, residuals, sizeof(residuals));
}

PAGED_CLONES void RunBlocks(const AdamStep& step, const Work& work, int64_t begin, int64_t end) {
  float values[kLane];
  int64_t index = FindLeaf(work.leaves, work.num_leaves, begin);
  for (int64_t w = begin; w < end; ++w) {
    // Empty leaves own no work: pass over them too.
    while (index + 1 < work.num_leaves && work.leaves[index + 1].first_work <= w) ++index;
    const Leaf& leaf = work.leaves[index];
    const int64_t in_leaf = w - leaf.first_work;
    const int64_t start = in_leaf * kBlockSize;
    const int64_t left = leaf.size - start;
    const int count = left < kLane ? static_cast<int>(left) : kLane;
    Load(leaf.grads, leaf.dtype, start, count, values);
    const int64_t block = leaf.first_block + in_leaf;
    if (Is8Bit(leaf.codec)) {
      alignas(64) uint8_t mu[kLane], nu[kLane];
      float mu_scale = 0.0f, nu_scale = 0.0f;
      if (work.source == nullptr) {
        const bool is_ratio = leaf.codec == Codec::kRatio;
        std::memset(mu, is_ratio ? kZeroRatio : kZeroMu, sizeof(mu));
        std::memset(nu, is_ratio ? kZeroRatio : kZeroNu, sizeof(nu));
      } else {
        const auto source = work.extent.LocateQuantized(work.source, block);
        std::memcpy(mu, source.mu, sizeof(mu));
        std::memcpy(nu, source.nu, sizeof(nu));
        mu_scale = source.scales[0];
        nu_scale = source.scales[1];
      }
      if (leaf.codec == Codec::kDynamic) {
        StepDynamicBlock<kLane>(IeeeMath(), step, kMaps, values, mu, nu, mu_scale, nu_scale,
                                WholeBlock());
      } else {
        StepRatioBlock<kLane>(IeeeMath(), step, RatioStart(leaf.key, start), values, mu, nu,
                              mu_scale, nu_scale, WholeBlock());
      }
      const auto target = work.extent.LocateQuantized(work.target, block);
      std::memcpy(target.mu, mu, sizeof(mu));
      std::memcpy(target.nu, nu, sizeof(nu));
      target.scales[0] = mu_scale;
      target.scales[1] = nu_scale;
    } else {
      alignas(64) float mu[kLane] = {}, nu[kLane] = {};
      if (work.source != nullptr) {
        const auto source = work.extent.LocateFloat32(work.source, block);
        std::memcpy(mu, source.mu, sizeof(mu));
        std::memcpy(nu, source.nu, sizeof(nu));
      }
      StepFloat32Block<kLane>(IeeeMath(), step, values, mu, nu);
      const auto target = work.extent.LocateFloat32(work.target, block);
      std::memcpy(target.mu, mu, sizeof(mu));
      std::memcpy(target.nu, nu, sizeof(nu));
    }
    if (work.params != nullptr) StepParams(work, leaf, start, count, block, values);
    Store(leaf, start, count, values);
  }
}

}  // namespace

void StepBlocksCpu(const AdamStep& step, const Work& work, int64_t begin, int64_t end) {
  ScopedIeeeMode mode;
  RunBlocks(step, work, begin, end);
}

}  // namespace paged_optax
