// One leaf of the tree, as a step sees it.
#pragma once

#include "base/dtype.h"
#include "step/params.h"

namespace paged_optax {

// What leaves the step for each element. A number in a program is a place here.
enum class Output : int8_t {
  kDirection,  // what the rule says, before the learning rate
  kUpdate,     // what the parameter changes by: the step takes the parameters too
};
inline constexpr std::array kOutputNames = {"direction", "update"};

// Gradients and updates share a buffer (the call aliases them) except where XLA feeds a slice of
// something larger, as in a scan over stacked gradients.
struct Leaf {
  const void* grads;
  void* updates;
  const void* params;   // kUpdate
  int64_t size;         // elements
  int64_t first_block;  // in the region of its format
  uint64_t key;         // of its random bits
  DType dtype;          // of gradients and updates
  int8_t format;
  // For kUpdate:
  DType param_dtype;
  ParamRounding rounding;
  bool decays;  // whether weight decay applies
};

// The leaf that block number `block` of a region belongs to: the last one that starts at or before
// it. `leaves` are those of the region, in the order of their blocks.
PAGED_HD int64_t FindLeaf(const Leaf* leaves, int64_t num_leaves, int64_t block) {
  int64_t low = 0, high = num_leaves;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (leaves[middle].first_block <= block) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

}  // namespace paged_optax
