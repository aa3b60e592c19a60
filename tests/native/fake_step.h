// A step that writes its version into samples of the moments, and checks that all samples that it
// reads have the version before. So a segment that the host and the GPU see in two places, or that
// a step missed, is found out.
#pragma once

#include <cstdint>

#include "layout/geometry.h"
#include "step/step_cuda.h"

// Bytes of a sample, and from one to the next.
inline constexpr int64_t kSample = 64, kStride = 2 << 20;

// Of moments with this handle and version.
inline uint8_t Pattern(int32_t handle, int32_t version) {
  return static_cast<uint8_t>(version * 37 + handle * 11);
}

// Ends the process unless all bytes of a sample are the same one.
void Check(const char* what, const uint8_t* sample, uint8_t expected);

// Steps so many bytes of a slot: `source` is null if nothing is read.
void StepBytes(const uint8_t* source, uint8_t* target, int64_t nbytes, uint8_t before,
               uint8_t after);

namespace paged_optax {

// What the loads and stores of a step do that LaunchUpdate began, whose token is in `new_token`.
void LaunchRest(const CudaUpdate& update);

}  // namespace paged_optax
