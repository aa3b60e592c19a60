// The global norm of gradients, and the factor by which it clips them. Written once: the order of
// the sum is part of it, so CPU and GPU come to the same bits.
//
// A leaf is cut into pieces of 64 blocks. Lane t of 32 has the elements t, t + 32, t + 64 and so on
// of each block. It adds the 8 squares of a block in float32, halves of the block onto each other,
// and what blocks give in float64, in their order. The lanes of a piece are added in float64,
// halves onto each other, and so are the pieces of all leaves, after each of 256 adders has added
// every 256th. So a float32 rounding happens four times on the way of a square, whatever the size
// of the tree: the norm is right within two units in the last place, if no square overflows or is
// subnormal.
#pragma once

#include "base/dtype.h"
#include "base/search.h"
#include "formats/format.h"

namespace paged_optax {

inline constexpr int kNormLanes = 32;
inline constexpr int64_t kPieceSize = 64 * kBlockSize;  // elements
inline constexpr int kNormAdders = 256;

// One leaf. Pieces are numbered through the leaves.
struct NormLeaf {
  const void* data;
  int64_t size;  // elements
  int32_t first_piece;
  DType dtype;
};

PAGED_HD int64_t NumPieces(int64_t size) { return (size + kPieceSize - 1) / kPieceSize; }

// Hyperparameters of a step that clips: these come last.
inline constexpr int kNumClipHyperparams = 2;  // the arguments of ClipScale

// By what a gradient is multiplied. As in optax, a norm that is infinite or NaN makes gradients 0
// and NaN.
PAGED_HD float ClipScale(float norm, float max_norm) {
  return norm < max_norm ? 1.0f : max_norm / norm;
}

}  // namespace paged_optax
