// The protocol between a token in the optimizer state and the moments it stands for. Judged on the
// host by the CPU handler and on the device by the CUDA kernel, so that a step need not wait for a
// token.
#pragma once

#include "layout/array_place.h"
#include "layout/geometry.h"

namespace paged_optax {

// What the optimizer state carries: which arena, and which contents of it. Version 0 is a fresh
// state, whose moments are zero.
struct Token {
  int32_t handle;
  int32_t version;  // below 0 while the arrays of a step are loaded and stored, see Open
};

// What an arena knows of itself. On the GPU an array of these lies in device memory, and kernels
// advance the versions.
struct Header {
  int32_t handle;
  int32_t version;  // the newest; every executed step makes a new one
  // One slot holds the newest moments. A second (replay) keeps those before the last step, so that
  // it can be run again: a step reads the slot of its token's version and writes the other one.
  int32_t num_slots;
  int32_t versions[kMaxSlots];  // of the slots' contents; 0 for none; below 0 see Open
  int32_t counts[kMaxSlots];    // the count of a state with these contents; kNoCount if not known
  int32_t started;              // the first version of the newest life; 0 before the first step
  SegmentTable* segments;       // where the slots lie
  uint64_t layout;              // LayoutOf the calls that the moments belong to
  // The token for which the moments are zero, whatever the arena holds. Its version is 0, unless
  // the moments of a state were missing and it started over; then its count goes on from here.
  int32_t first_version;
  int32_t first_count;
  // Of the rule "array": where its leaves lie.
  const ArrayPlace* places;
  int32_t num_places;
};

// What an arena compares: a call's fingerprint, and which parts of the leaves its device has. The
// latter is known only where the call runs: it depends on the device's place in the mesh.
PAGED_HD uint64_t LayoutOf(uint64_t fingerprint, int32_t part) {
  return fingerprint ^ (static_cast<uint64_t>(static_cast<uint32_t>(part)) * 0x9e3779b97f4a7c15u);
}

// The count of a step that is to be skipped. No other number below 0 is a count.
inline constexpr int32_t kSkipStep = -0x7fffffff - 1;

// The count of moments that were restored, until a step says it.
inline constexpr int32_t kNoCount = -1;

enum class Verdict : int32_t { kAccept, kFresh, kUnknown, kOtherLayout, kStale, kBadCount };

PAGED_HD bool IsAccepted(Verdict verdict) {
  return verdict == Verdict::kAccept || verdict == Verdict::kFresh;
}

// What a step may do: from which slot to which. They are the same where there is one, and where
// there is nothing to read.
struct Judgement {
  Verdict verdict;
  int32_t source;
  int32_t target;
};

// The slot that holds these contents, or -1. Version 0 is of no contents.
PAGED_HD int32_t FindSlot(const Header& header, int32_t version) {
  for (int32_t slot = 0; version > 0 && slot < header.num_slots; ++slot) {
    if (header.versions[slot] == version) return slot;
  }
  return -1;
}

PAGED_HD Judgement Judge(const Header* header, Token token, uint64_t layout) {
  if (header == nullptr) return {Verdict::kUnknown, 0, 0};
  if (header->layout != layout) return {Verdict::kOtherLayout, 0, 0};
  if (token.version == header->first_version) return {Verdict::kFresh, 0, 0};
  const int32_t slot = FindSlot(*header, token.version);
  if (slot >= 0) return {Verdict::kAccept, slot, header->num_slots - 1 - slot};
  return {Verdict::kStale, 0, 0};
}

// An accepted step needs a count, or is to be skipped.
PAGED_HD Verdict JudgeCount(Verdict verdict, int32_t count) {
  return IsAccepted(verdict) && count < 0 && count != kSkipStep ? Verdict::kBadCount : verdict;
}

// Never 0, never a version that a state still around can hold: 2^31 - 1 steps pass before one
// returns.
PAGED_HD int32_t NextVersion(int32_t version) { return version == 0x7fffffff ? 1 : version + 1; }

// How many steps the newest life has seen.
PAGED_HD int32_t StepsOfLife(const Header& header) {
  return header.started == 0 ? 0 : header.version - header.started + 1;
}

// Steps that the moments of an accepted step have seen.
PAGED_HD int32_t StepsSeen(const Header& header, Judgement judgement, int32_t count) {
  if (header.first_version == 0) return count;
  if (judgement.verdict == Verdict::kFresh || count < header.first_count) return 0;
  return count - header.first_count;
}

// Notes an accepted step with this count in the header and returns the token of its result.
PAGED_HD Token Advance(Header* header, Judgement judgement, int32_t count) {
  header->version = NextVersion(header->version);
  if (judgement.verdict == Verdict::kFresh) {
    header->versions[1] = 0;  // a new life ends the one before it
    header->started = header->version;
    header->first_count = header->first_version == 0 ? 0 : count;
  }
  header->versions[judgement.target] = header->version;
  header->counts[judgement.target] = count == 0x7fffffff ? count : count + 1;
  return {header->handle, header->version};
}

// A step whose arrays are loaded and stored by calls of their own begins with Open and ends with
// Close. Meanwhile its slot and its token have its version below 0: these are no contents, so that
// nobody else can read them or step from them.
PAGED_HD Token Open(Header* header, Judgement judgement, int32_t count) {
  const Token token = Advance(header, judgement, count);
  header->versions[judgement.target] = -token.version;
  return {token.handle, -token.version};
}

// The slot that an open step writes, or -1.
PAGED_HD int32_t FindOpenSlot(const Header* header, Token token) {
  for (int32_t slot = 0; header && token.version < 0 && slot < header->num_slots; ++slot) {
    if (header->versions[slot] == token.version) return slot;
  }
  return -1;
}

// The slot that an open step reads; -1 for zeros. Where it is the one that the step writes, each
// leaf is loaded before it is stored.
PAGED_HD int32_t FindOpenSource(const Header& header, int32_t slot) {
  return header.started == -header.versions[slot] ? -1 : header.num_slots - 1 - slot;
}

PAGED_HD Token Close(Header* header, int32_t slot) {
  header->versions[slot] = -header->versions[slot];
  return {header->handle, header->versions[slot]};
}

// What an open step that was lost goes on with: no later call takes it for open, or reports it
// again. A token of before the step, or one that was lost already, stays as it is.
PAGED_HD Token LostToken(Token token) {
  return {token.handle, token.version < 0 ? 0 : token.version};
}

// A step that was refused, as the device reports it to the host. `verdict` is written last; kAccept
// means that there is nothing to report.
struct Rejection {
  Verdict verdict;
  Token token;
  int32_t version;       // of the arena
  uint64_t fingerprint;  // of the call
};

// A fresh state whose step ended a life that had seen so many. `steps` is written last; 0 means
// that there is nothing to report. One step alone is no such life: who runs the first step again,
// as optax.MultiSteps does, begins anew.
struct Restart {
  int32_t steps;
  int32_t handle;
};

// The steps that a restart is about to end, or 0 if that is nothing to speak of.
PAGED_HD int32_t StepsToEnd(const Header& header, Verdict verdict) {
  const int32_t steps = verdict == Verdict::kFresh ? StepsOfLife(header) : 0;
  return steps > 1 ? steps : 0;
}

// What a device reports.
struct Reports {
  Rejection rejection;
  Restart restart;
};

}  // namespace paged_optax
