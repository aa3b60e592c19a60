// How fast the link between the host and a GPU is, to compare steps with.
#pragma once

#include <cstdint>

namespace paged_optax {

// Bytes per second of the copy engines between pinned host memory and the GPU.
struct LinkRates {
  double in, out, each_way;  // one direction alone, the other, and each while both are busy
};

// The best of a few copies of `nbytes`; takes as many of device memory and of pinned host memory,
// twice, for the time being.
LinkRates MeasureLink(int device, int64_t nbytes);

}  // namespace paged_optax
