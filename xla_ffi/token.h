// The protocol between a token in the optimizer state and the moments it stands for. Judged on the
// host by the CPU handler and on the device by the CUDA kernel, so that a step need not wait for a
// token.
#pragma once

#include "portable.h"

namespace paged_optax {

// What the optimizer state carries: which arena, and which contents of it. Version 0 is a fresh
// state, whose moments are zero whatever the arena holds.
struct Token {
  int32_t handle;
  int32_t version;
};

// What an arena knows of itself. On the GPU an array of these lies in device memory, and kernels
// advance the versions.
struct Header {
  int32_t handle;
  int32_t version;  // of the contents; every executed step makes a new one
  uint64_t layout;  // fingerprint of the leaves' shapes and codecs
  uint8_t* base;
};

enum class Verdict : int32_t { kAccept, kFresh, kUnknown, kOtherLayout, kStale };

PAGED_HD Verdict Judge(const Header* header, Token token, uint64_t layout) {
  if (header == nullptr) return Verdict::kUnknown;
  if (header->layout != layout) return Verdict::kOtherLayout;
  if (token.version == 0) return Verdict::kFresh;
  return token.version == header->version ? Verdict::kAccept : Verdict::kStale;
}

PAGED_HD bool IsAccepted(Verdict verdict) {
  return verdict == Verdict::kAccept || verdict == Verdict::kFresh;
}

// Never 0, never a version that a state still around can hold: 2^31 - 1 steps pass before one
// returns.
PAGED_HD int32_t NextVersion(int32_t version) { return version == 0x7fffffff ? 1 : version + 1; }

// A step that was refused, as the device reports it to the host. `verdict` is written last; kAccept
// means that there is nothing to report.
struct Rejection {
  Verdict verdict;
  Token token;
  int32_t version;  // of the arena
  uint64_t layout;  // of the call
};

}  // namespace paged_optax
