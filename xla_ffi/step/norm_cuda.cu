// The kernels of the global norm, and their launch. One kernel sums pieces, a warp for each; a
// second one, of a single thread block, adds them: it may only run when all pieces are there.
#include <algorithm>

#include "base/cuda_check.h"
#include "step/launch_cuda.h"
#include "step/norm_cuda.h"

namespace paged_optax {
namespace {

static_assert(kNormLanes == kWarpSize && kNormAdders == kThreads);

// Leaves travel with the launch, by value; small trees travel with less.
constexpr int kFewLeaves = 60;
constexpr int kManyLeaves = 1300;

template <int kLeaves>
struct NormTable {
  NormLeaf leaves[kLeaves];
  int num_leaves;
  int32_t first_piece, end_piece;
  double* pieces;  // of all leaves
};

static_assert(sizeof(NormTable<kManyLeaves>) <= 32764, "kernel parameters of CUDA 12.1 and newer");

template <DType kDType>
__device__ float LoadOne(const NormLeaf& leaf, int64_t i) {
  if (i >= leaf.size) return 0.0f;
  if constexpr (kDType == DType::kFloat32) {
    return static_cast<const float*>(leaf.data)[i];
  } else {
    const uint16_t half = static_cast<const uint16_t*>(leaf.data)[i];
    return kDType == DType::kBFloat16 ? FromBFloat16(half) : FromFloat16(half);
  }
}

// What a thread's elements of a block add to its lane.
template <DType kDType>
__device__ float SumOfBlock(const NormLeaf& leaf, int64_t start, int thread) {
  float squares[kLane];
#pragma unroll
  for (int j = 0; j < kLane; ++j) {
    squares[j] = LoadOne<kDType>(leaf, start + j * kWarpSize + thread);
  }
#pragma unroll
  for (int j = 0; j < kLane; ++j) squares[j] *= squares[j];
#pragma unroll
  for (int half = kLane / 2; half > 0; half /= 2) {
#pragma unroll
    for (int j = 0; j < half; ++j) squares[j] += squares[j + half];
  }
  return squares[0];
}

// A thread's lane of the elements [begin, end). A loop for each dtype, so that no branch keeps the
// loads of four blocks from being under way together.
template <DType kDType>
__device__ double SumOfLane(const NormLeaf& leaf, int64_t begin, int64_t end, int thread) {
  double lane = 0.0;
#pragma unroll 4
  for (int64_t start = begin; start < end; start += kBlockSize) {
    lane += SumOfBlock<kDType>(leaf, start, thread);
  }
  return lane;
}

__device__ double SumOfLane(const NormLeaf& leaf, int64_t begin, int64_t end, int thread) {
  switch (leaf.dtype) {
    case DType::kFloat32:
      return SumOfLane<DType::kFloat32>(leaf, begin, end, thread);
    case DType::kBFloat16:
      return SumOfLane<DType::kBFloat16>(leaf, begin, end, thread);
    case DType::kFloat16:
      return SumOfLane<DType::kFloat16>(leaf, begin, end, thread);
  }
  return 0.0;
}

template <int kLeaves>
__global__ void __launch_bounds__(kThreads)
    SumPiecesKernel(const __grid_constant__ NormTable<kLeaves> table) {
  const int thread = static_cast<int>(threadIdx.x) % kWarpSize;
  const int32_t stride = static_cast<int32_t>(gridDim.x) * kWarps;
  int32_t piece = table.first_piece + static_cast<int32_t>(blockIdx.x) * kWarps +
                  static_cast<int32_t>(threadIdx.x) / kWarpSize;
  for (; piece < table.end_piece; piece += stride) {
    const NormLeaf leaf =
        table.leaves[FindLast(table.leaves, table.num_leaves, &NormLeaf::first_piece, piece)];
    const int64_t begin = (piece - leaf.first_piece) * kPieceSize;
    const int64_t end = min(begin + kPieceSize, leaf.size);
    double lane = SumOfLane(leaf, begin, end, thread);
#pragma unroll
    for (int half = kWarpSize / 2; half > 0; half /= 2) {
      lane += __shfl_xor_sync(0xffffffffu, lane, half);
    }
    if (thread == 0) table.pieces[piece] = lane;
  }
}

__global__ void __launch_bounds__(kThreads)
    AddPiecesKernel(const double* pieces, int32_t num_pieces, float* norm) {
  __shared__ double adders[kNormAdders];
  const int thread = static_cast<int>(threadIdx.x);
  double sum = 0.0;
#pragma unroll 8
  for (int32_t i = thread; i < num_pieces; i += kNormAdders) sum += pieces[i];
  adders[thread] = sum;
  for (int half = kNormAdders / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread < half) adders[thread] += adders[thread + half];
  }
  if (thread == 0) *norm = static_cast<float>(sqrt(adders[0]));
}

template <int kLeaves>
void LaunchSum(const NormLeaf* leaves, int64_t num_leaves, double* pieces, int device,
               Stream stream) {
  NormTable<kLeaves> table{};
  table.num_leaves = static_cast<int>(num_leaves);
  table.first_piece = leaves[0].first_piece;
  const NormLeaf& last = leaves[num_leaves - 1];
  table.end_piece = last.first_piece + static_cast<int32_t>(NumPieces(last.size));
  table.pieces = pieces;
  std::copy_n(leaves, num_leaves, table.leaves);
  if (table.first_piece == table.end_piece) return;
  const auto kernel = SumPiecesKernel<kLeaves>;
  const auto blocks =
      static_cast<unsigned>(NumThreadBlocks(kernel, table.end_piece - table.first_piece, device));
  CUDA_LAUNCH(kernel<<<blocks, kThreads, 0, stream>>>(table));
}

}  // namespace

size_t NormScratchBytes(int32_t num_pieces) {
  return sizeof(double) * static_cast<size_t>(std::max(num_pieces, 1));
}

void LaunchNorm(const NormLeaf* leaves, int64_t num_leaves, int32_t num_pieces, void* scratch,
                float* norm, int device, Stream stream) {
  ScopedDevice scope(device);
  double* const pieces = static_cast<double*>(scratch);
  if (num_leaves <= kFewLeaves && num_leaves > 0) {
    LaunchSum<kFewLeaves>(leaves, num_leaves, pieces, device, stream);
  } else {
    for (int64_t first = 0; first < num_leaves; first += kManyLeaves) {
      LaunchSum<kManyLeaves>(leaves + first, std::min<int64_t>(num_leaves - first, kManyLeaves),
                             pieces, device, stream);
    }
  }
  CUDA_LAUNCH(AddPiecesKernel<<<1, kThreads, 0, stream>>>(pieces, num_pieces, norm));
}

}  // namespace paged_optax
