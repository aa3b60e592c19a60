// The step on the CPU.
#pragma once

#include "step/block.h"

namespace paged_optax {

// The blocks of one region that a call steps.
struct CpuWork {
  const Leaf* leaves;  // of the region, in the order of their blocks
  int64_t num_leaves;
  Region region;
  const uint8_t* source;  // base of the slot that is read; nullptr for a fresh state's zeros
  uint8_t* target;        // base of the slot that is written; may be the source
  Output output;
};

// Steps blocks [begin, end) of a region on the calling thread.
using CpuStep = void (*)(const AnyStep& step, const CpuWork& work, int64_t begin, int64_t end);

// nullptr if there is no such rule or format, or the rule has no arithmetic.
CpuStep FindCpuStep(const StepKind& kind, int8_t format);

AnyStep PrepareStep(const StepKind& kind, const float* hyperparams, int32_t count);

}  // namespace paged_optax
