// Loads and stores arrays on the CPU.
#pragma once

#include "base/dtype.h"
#include "layout/array_place.h"

namespace paged_optax {

// An array in XLA's memory, and its leaf.
struct ArrayWork {
  void* data;
  DType dtype;
  ArrayPlace place;
  uint8_t* base;   // of the slot; nullptr to load zeros
  uint64_t key;    // to store: of the leaf's random bits
  uint32_t phase;  // to store: DitherPhase of the step
};

// Blocks [begin, end) of a leaf, on the calling thread.
using ArrayRun = void (*)(const ArrayWork& work, int64_t begin, int64_t end);

// nullptr if there is no such format.
ArrayRun FindArrayRun(int64_t format, bool stores);

}  // namespace paged_optax
