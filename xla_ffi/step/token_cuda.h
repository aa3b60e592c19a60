// What kernels do with a token before a step, and with one that they refuse.
#pragma once

#include "layout/token.h"
#include "step/lane_cuda.h"

namespace paged_optax {

// The header of a token's arena, found by one warp; null if there is none here.
__device__ inline Header* FindHeader(Header* headers, int num_headers, Token token) {
  int found = -1;
  for (int i = static_cast<int>(threadIdx.x); i < num_headers; i += kWarpSize) {
    if (headers[i].handle == token.handle) found = i;
  }
  found = __reduce_max_sync(0xffffffffu, found);
  return found < 0 ? nullptr : &headers[found];
}

// The host reads this without waiting for the device; the first unread report stays. `reports` is
// null where nobody is to be told.
__device__ inline void ReportRejection(Reports* reports, Token token, Verdict verdict,
                                       const Header* header, uint64_t fingerprint) {
  if (reports == nullptr) return;
  volatile Rejection* report = &reports->rejection;
  if (report->verdict != Verdict::kAccept) return;
  report->token.handle = token.handle;
  report->token.version = token.version;
  report->version = header == nullptr ? 0 : header->version;
  report->fingerprint = fingerprint;
  __threadfence_system();
  report->verdict = verdict;
}

}  // namespace paged_optax
