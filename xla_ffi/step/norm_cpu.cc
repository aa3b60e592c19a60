// See norm_cpu.h.
#include "step/norm_cpu.h"

#include <algorithm>
#include <cmath>

#include "base/cpu.h"
#include "step/lane_cpu.h"

namespace paged_optax {
namespace {

// Adds the upper half of the numbers onto the lower one, until one is left.
template <int N, class T>
PAGED_HD void Fold(T* numbers, int down_to = 1) {
  for (int half = N / 2; half >= down_to; half /= 2) {
    for (int i = 0; i < half; ++i) numbers[i] += numbers[i + half];
  }
}

PAGED_CLONES double SumSquares(const NormLeaf& leaf, int64_t begin, int64_t end) {
  alignas(64) double lanes[kNormLanes] = {};
  alignas(64) float values[kCpuLane];
  for (int64_t start = begin; start < end; start += kCpuLane) {
    const int count = static_cast<int>(std::min<int64_t>(end - start, kCpuLane));
    LoadBlock(leaf.data, leaf.dtype, start, count, values);
    for (int k = 0; k < kCpuLane; ++k) values[k] *= values[k];
    Fold<kCpuLane>(values, kNormLanes);
    for (int t = 0; t < kNormLanes; ++t) lanes[t] += values[t];
  }
  Fold<kNormLanes>(lanes);
  return lanes[0];
}

}  // namespace

double SumPiece(const NormLeaf& leaf, int32_t piece) {
  const ScopedIeeeMode mode;
  const int64_t begin = (piece - leaf.first_piece) * kPieceSize;
  return SumSquares(leaf, begin, std::min(begin + kPieceSize, leaf.size));
}

float NormOf(const std::vector<double>& pieces) {
  const ScopedIeeeMode mode;
  double adders[kNormAdders] = {};
  for (size_t i = 0; i < pieces.size(); ++i) adders[i % kNormAdders] += pieces[i];
  Fold<kNormAdders>(adders);
  return static_cast<float>(std::sqrt(adders[0]));
}

}  // namespace paged_optax
