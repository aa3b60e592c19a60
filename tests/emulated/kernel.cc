// Steps of the kernels' own source, in emulated threads, beside the same steps block by block.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "base/math.h"
#include "emulation.h"
#include "step/kernel_cuda.h"
#include "step/lane_cpu.h"

namespace paged_optax {
namespace {

using Bytes = std::vector<uint8_t>;

struct LeafKind {
  int64_t size;
  DType grads, params;
  ParamRounding rounding;
  bool is_aligned, has_specials;
};

constexpr DType kF32 = DType::kFloat32, kBF16 = DType::kBFloat16, kF16 = DType::kFloat16;
constexpr ParamRounding kNearest = ParamRounding::kNearest;
constexpr ParamRounding kStochastic = ParamRounding::kStochastic;
constexpr ParamRounding kCompensated = ParamRounding::kCompensated;
constexpr LeafKind kKinds[] = {
    {256 * 70, kF32, kF32, kNearest, true, false},
    {256 * 40 + 9, kBF16, kBF16, kNearest, true, false},
    {256 * 33, kBF16, kBF16, kStochastic, true, true},
    {0, kF32, kF32, kNearest, true, false},
    {256 * 35 + 255, kBF16, kBF16, kCompensated, true, false},
    {5, kF32, kF32, kNearest, true, false},
    {256 * 18, kF16, kF16, kStochastic, true, false},
    {256 * 17 + 3, kF16, kF16, kCompensated, true, true},
    {256 * 19, kBF16, kF32, kNearest, true, true},
    {256 * 21, kF32, kBF16, kCompensated, true, false},
    {256 * 5 + 1, kF32, kF32, kNearest, false, true},
    {256 * 4, kBF16, kBF16, kStochastic, false, false},
};

void Write(DType dtype, float x, uint8_t* target) {
  if (dtype == DType::kFloat32) {
    std::memcpy(target, &x, 4);
  } else {
    const uint16_t half = dtype == DType::kBFloat16 ? ToBFloat16(x) : ToFloat16(x);
    std::memcpy(target, &half, 2);
  }
}

float Read(DType dtype, const uint8_t* source) {
  float x;
  uint16_t half;
  if (dtype == DType::kFloat32) {
    std::memcpy(&x, source, 4);
    return x;
  }
  std::memcpy(&half, source, 2);
  return dtype == DType::kBFloat16 ? FromBFloat16(half) : FromFloat16(half);
}

// Arrays of the leaves one after the other, with bytes between them that nobody may touch.
struct Tree {
  Bytes bytes;
  std::vector<size_t> places;

  explicit Tree(bool is_params) {
    size_t end = 0;
    for (const LeafKind& kind : kKinds) {
      const int64_t size = SizeOf(is_params ? kind.params : kind.grads);
      end = (end + 64 + 15) / 16 * 16 + (kind.is_aligned ? 0 : size);
      places.push_back(end);
      end += kind.size * size;
    }
    bytes.assign(end + 64, 0xa5);
  }

  void Fill(bool is_params, std::mt19937& generator) {
    std::normal_distribution<float> normal;
    for (size_t l = 0; l < places.size(); ++l) {
      const LeafKind& kind = kKinds[l];
      const DType dtype = is_params ? kind.params : kind.grads;
      for (int64_t i = 0; i < kind.size; ++i) {
        float x = 0.1f * normal(generator);
        if (!is_params && kind.has_specials) {
          if (i % 7 == 0) x = 0.0f;
          if (i % 601 == 0) x = 1e-30f;
          if (i % 4099 == 0) x = FloatOf(i % 2 ? 0x7fc00000 : 0x7f000000);
        }
        Write(dtype, x, &bytes[places[l] + i * SizeOf(dtype)]);
      }
    }
  }
};

// One side of the comparison: what a step reads and changes.
struct Side {
  Tree grads{false}, params{true};
  Bytes slot;

  std::vector<Leaf> Leaves(Output output) {
    std::vector<Leaf> leaves;
    int64_t first_block = 0;
    for (size_t l = 0; l < std::size(kKinds); ++l) {
      const LeafKind& kind = kKinds[l];
      uint8_t* g = &grads.bytes[grads.places[l]];
      uint8_t* p = &params.bytes[params.places[l]];
      const bool in_place = output == Output::kParams;
      leaves.push_back({g, in_place ? p : g, TakesParams(output) ? p : nullptr, kind.size,
                        first_block, 0x123456789abcdefull * (l + 1), kind.grads,
                        in_place ? kind.params : kind.grads, 0, kind.params, kind.rounding,
                        l % 2 == 0});
      first_block += NumBlocks(kind.size);
    }
    return leaves;
  }
};

// A block on its own, with the arithmetic of the CPU.
template <class Rule, class Format>
void StepOne(const StepOf<Rule>& step, const Leaf& leaf, const Region& region, int64_t block,
             Output output, bool is_fresh, uint8_t* slot) {
  constexpr int K = static_cast<int>(kBlockSize);
  static const auto tables = Format::template MakeTables<int32_t>();
  const BlockPlace place = region.Locate(block);
  const int64_t start = (block - leaf.first_block) * kBlockSize;
  const int count = static_cast<int>(min(leaf.size - start, kBlockSize));
  alignas(64) float values[K] = {}, params[K] = {};
  uint8_t residuals[K];
  Lane<Rule, Format, K> lane;
  std::memset(residuals, kZeroResidual, K);
  for (int k = 0; k < count; ++k) {
    const auto at = [&](DType dtype) { return (start + k) * SizeOf(dtype); };
    values[k] = Read(leaf.dtype, static_cast<const uint8_t*>(leaf.grads) + at(leaf.dtype));
    if (leaf.params == nullptr) continue;
    params[k] =
        Read(leaf.param_dtype, static_cast<const uint8_t*>(leaf.params) + at(leaf.param_dtype));
  }
  LoadLane(is_fresh ? nullptr : slot, place, lane);
  if (!is_fresh && region.shape.residual_bytes != 0) {
    std::memcpy(residuals, slot + place.residuals, K);
  }
  StepBlock(IeeeMath(), step, tables, leaf.key, start, is_fresh ? count : 0, values, lane,
            WholeBlock());
  StoreLane(lane, place, slot);
  if (output == Output::kUpdate) {
    UpdateParams<Output::kUpdate>(step.params, leaf, start, params, residuals, values);
  } else if (output == Output::kParams) {
    UpdateParams<Output::kParams>(step.params, leaf, start, params, residuals, values);
  }
  if (region.shape.residual_bytes != 0) std::memcpy(slot + place.residuals, residuals, K);
  for (int k = 0; k < count; ++k) {
    Write(leaf.result_dtype, values[k],
          static_cast<uint8_t*>(leaf.results) + (start + k) * SizeOf(leaf.result_dtype));
  }
}

void Compare(const char* name, const char* what, int step, const Bytes& a, const Bytes& b) {
  for (size_t i = 0; i < a.size(); ++i) {
    if (a[i] == b[i]) continue;
    std::printf("%s, step %d: byte %zu of the %s is %d, not %d\n", name, step, i, what, a[i], b[i]);
    std::exit(1);
  }
}

template <class Rule, class Format>
constexpr BlockShape ShapeOf(Output output) {
  using Arithmetic = typename Rule::Arithmetic;
  return {kNumStates<Arithmetic>, kStateBytes<Format>, kNumWords<Arithmetic, Format>,
          TakesParams(output) ? int32_t{kResidualBytes} : 0};
}

// Three steps. The region's blocks lie in two chunks, of which one is called the host's.
template <class Rule, class Format, int kOutput>
void Check(const char* name, const StepKind& kind, const std::vector<float>& hyperparams) {
  using Arithmetic = typename Rule::Arithmetic;
  const BlockShape shape = ShapeOf<Rule, Format>(kind.output);
  int64_t num_blocks = 0;
  for (const LeafKind& leaf : kKinds) num_blocks += NumBlocks(leaf.size);
  const Region region = MakeRegion(shape, num_blocks, kChunkBytes - 170 * shape.NumBytes());
  Side sides[2];
  std::mt19937 generator(1);
  for (Side& side : sides) side.slot.assign(RoundUp(region.end_byte, kChunkBytes), 0xa5);
  sides[0].params.Fill(true, generator);
  sides[1].params = sides[0].params;
  for (int t = 0; t < 3; ++t) {
    sides[0].grads.Fill(false, generator);
    sides[1].grads = sides[0].grads;
    const StepOf<Arithmetic> step = PrepareStep<Rule>(kind, hyperparams.data(), t);
    const std::vector<Leaf> leaves = sides[0].Leaves(kind.output);
    std::vector<uint8_t*> bases(kMaxSegments, sides[0].slot.data());
    ResolvedStep resolved{};
    std::memcpy(resolved.step.bytes, &step, sizeof(step));
    resolved.source = t == 0 ? nullptr : bases.data();
    resolved.target = bases.data();
    resolved.resident_blocks[0] = region.BlocksBelow(kChunkBytes);
    resolved.accepted = true;
    const RegionStep args{&resolved, leaves.data(), static_cast<int64_t>(leaves.size()), region,
                          0,         kind.output};
    Launch(2, kThreads, [&] { StepKernel<Arithmetic, Format, kOutput>(args); });
    for (const Leaf& leaf : sides[1].Leaves(kind.output)) {
      for (int64_t b = 0; b < NumBlocks(leaf.size); ++b) {
        StepOne<Arithmetic, Format>(step, leaf, region, leaf.first_block + b, kind.output, t == 0,
                                    sides[1].slot.data());
      }
    }
    Compare(name, "slot", t, sides[0].slot, sides[1].slot);
    Compare(name, "gradients", t, sides[0].grads.bytes, sides[1].grads.bytes);
    Compare(name, "parameters", t, sides[0].params.bytes, sides[1].params.bytes);
  }
  std::printf("%s: equal\n", name);
}

StepKind KindOf(Output output) {
  StepKind kind{};
  kind.output = output;
  return kind;
}

void CheckAll() {
  const StepKind direction = KindOf(Output::kDirection), update = KindOf(Output::kUpdate),
                 params = KindOf(Output::kParams);
  const std::vector<float> adam{0.9f, 0.999f, 1e-8f, 0.0f, 1e-2f, 0.1f};
  const std::vector<float> adam_root{0.9f, 0.999f, 0.0f, 1e-8f, 1e-2f, 0.1f};
  const std::vector<float> means{0.9f, 0.999f, 0.9999f, 6.0f, 1e-8f, 0.0f, 1e-2f, 0.1f};
  const std::vector<float> variance{0.9f, 1e-8f, 0.5f, 1e-2f, 0.1f};
  Check<Adam, Ratio, 0>("adam, direction", direction, adam);
  Check<Adam, Ratio, 1>("adam, update", update, adam);
  Check<Adam, Ratio, 2>("adam, parameters", params, adam);
  Check<Adam, Ratio, 2>("adam with eps_root, parameters", params, adam_root);
  Check<AdEMAMix, Ratio, 2>("ademamix, parameters", params, means);
  Check<StdDev, Ratio, kAnyOutput>("stddev, parameters", params, variance);
  Check<StdDev, Ratio, kAnyOutput>("stddev, direction", direction, variance);
  Check<Adam, Ratio6, kAnyOutput>("adam in 6 bits, parameters", params, adam);
  Check<Adam, Ratio6, kAnyOutput>("adam in 6 bits, direction", direction, adam);
  Check<AdEMAMix, Ratio6, kAnyOutput>("ademamix in 6 bits, parameters", params, means);
  Check<Adam, Ratio4, kAnyOutput>("adam in 4 bits, parameters", params, adam);
  Check<AdEMAMix, Ratio4, kAnyOutput>("ademamix in 4 bits, parameters", params, means);
  Check<Adam, Dynamic, kAnyOutput>("adam in dynamic, parameters", params, adam);
}

}  // namespace
}  // namespace paged_optax

int main() { paged_optax::CheckAll(); }
