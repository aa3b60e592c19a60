// What the moments of states would take, before there are any.
#pragma once

#include <cstdint>
#include <vector>

#include "state/arena.h"

namespace paged_optax {

// One state on one device, as its first step would make it.
struct Prospect {
  Signature signature;
  PlacementPolicy policy;
};

// Bytes of all slots. A GPU gives out memory in chunks, so its states take a little more.
struct Forecast {
  int64_t on_cpu;        // on a CPU
  int64_t on_gpu;        // on a GPU, wherever they are: as many of host memory
  int64_t resident;      // of those, in the memory of the GPU
  int64_t host_traffic;  // what a step reads over the link, and writes
};

// Of states that share a GPU on which `free_bytes` are free next to everything else.
std::vector<Forecast> MakeForecast(const std::vector<Prospect>& prospects, int64_t free_bytes);

}  // namespace paged_optax
