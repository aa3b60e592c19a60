// One leaf of the tree, as a step sees it.
#pragma once

#include "base/dtype.h"
#include "base/search.h"
#include "step/params.h"

namespace paged_optax {

// What leaves the step for each element. A number in a program is a place here.
enum class Output : int8_t {
  kDirection,  // what the rule says, before the learning rate
  kUpdate,     // what the parameter changes by: the step takes the parameters too
  kParams,     // the new parameter, in place of the old one
  kOpen,       // nothing yet: arrays are loaded and stored by calls of their own (step/array.h)
};
inline constexpr std::array kOutputNames = {"direction", "update", "params", "open"};

// Whether the step takes the parameters.
PAGED_HD constexpr bool TakesParams(Output output) {
  return output == Output::kUpdate || output == Output::kParams;
}

// The results share a buffer with the gradients, or for kParams with the parameters (the call
// aliases them), except where XLA feeds a slice of something larger, as in a scan over stacked
// gradients.
struct Leaf {
  const void* grads;
  void* results;
  const void* params;   // unless the output is kDirection
  int64_t size;         // elements
  int64_t first_block;  // in the region of its format
  uint64_t key;         // of its random bits
  DType dtype;          // of gradients
  DType result_dtype;
  int8_t format;
  // Unless the output is kDirection:
  DType param_dtype;
  ParamRounding rounding;
  bool decays;  // whether weight decay applies
};

// The leaf that block number `block` of a region belongs to: the last one that starts at or before
// it. `leaves` are those of the region, in the order of their blocks.
PAGED_HD int64_t FindLeaf(const Leaf* leaves, int64_t num_leaves, int64_t block) {
  return FindLast(leaves, num_leaves, &Leaf::first_block, block);
}

}  // namespace paged_optax
