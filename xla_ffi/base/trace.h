// Ranges by name on the host's line of a profile (Nsight Systems, xprof), through NVTX. Steps and
// the pager's moves are such ranges.
#pragma once

#if PAGED_OPTAX_CUDA && __has_include(<nvtx3/nvToolsExt.h>)
#define PAGED_OPTAX_NVTX 1
#include <nvtx3/nvToolsExt.h>
#else
#define PAGED_OPTAX_NVTX 0
#endif

namespace paged_optax {

// Lasts from here to the end of the scope. NVTX is headers only and links no library: its first
// call asks the environment for a profiler, and without one every later call is a test of a
// pointer.
class TraceRange {
 public:
  explicit TraceRange([[maybe_unused]] const char* name) {
#if PAGED_OPTAX_NVTX
    nvtxRangePushA(name);
#endif
  }
  ~TraceRange() {
#if PAGED_OPTAX_NVTX
    nvtxRangePop();
#endif
  }
  TraceRange(const TraceRange&) = delete;
  TraceRange& operator=(const TraceRange&) = delete;
};

}  // namespace paged_optax
