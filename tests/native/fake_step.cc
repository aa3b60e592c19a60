// See fake_step.h. In the place of step_cuda.cu, and of what fills a restored state.
#include "fake_step.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "base/cuda_check.h"
#include "state/fill.h"
#include "state/fits.h"
#include "step/step_cuda.h"

void Check(const char* what, const uint8_t* sample, uint8_t expected) {
  if (sample[0] == expected && std::memcmp(sample, sample + 1, kSample - 1) == 0) return;
  std::fprintf(stderr, "%s: other bytes than %d: lost moments\n", what, expected);
  std::abort();
}

void StepBytes(const uint8_t* source, uint8_t* target, int64_t nbytes, uint8_t before,
               uint8_t after) {
  for (int64_t at = 0; at + kSample <= nbytes; at += kStride) {
    if (source != nullptr) Check("step", source + at, before);
    std::memset(target + at, after, kSample);
  }
}

namespace paged_optax {
namespace {

int64_t SlotBytesOf(const CudaUpdate& update) {
  return RoundUp(RoundUp(update.regions.back().region.end_byte, 512), kChunkBytes);
}

// As the kernels do it.
void Report(const CudaUpdate& update, Verdict verdict, const Header* header) {
  if (update.reports == nullptr) return;
  Rejection* report = &update.reports->rejection;
  // The host looks without a lock, so the verdict comes last, as with __threadfence_system.
  if (__atomic_load_n(&report->verdict, __ATOMIC_ACQUIRE) != Verdict::kAccept) return;
  report->token = *update.token;
  report->version = header == nullptr ? 0 : header->version;
  report->fingerprint = update.fingerprint;
  __atomic_store_n(&report->verdict, verdict, __ATOMIC_RELEASE);
}

Header* FindHeader(const CudaUpdate& update) {
  for (int i = 0; i < update.num_headers; ++i) {
    if (update.headers[i].handle == update.token->handle) return &update.headers[i];
  }
  return nullptr;
}

// `source`: -1 if nothing is read.
void StepSlot(const CudaUpdate& update, const Header& header, int32_t source, int32_t target,
              int32_t version) {
  const SegmentTable& table = *header.segments;
  const int64_t slot_bytes = SlotBytesOf(update), segment = kChunkBytes << table.log2_chunks;
  for (int64_t k = 0, at = 0; at < slot_bytes; ++k, at += segment) {
    const int64_t nbytes = std::min(segment, slot_bytes - at);
    StepBytes(source < 0 ? nullptr : table.bases[source][k] + at, table.bases[target][k] + at,
              nbytes, Pattern(header.handle, update.token->version),
              Pattern(header.handle, version));
  }
}

}  // namespace

void LaunchUpdate(const CudaUpdate& update, int, Stream) {
  if (PAGED_FAILS("launch")) throw CudaError(StatusCode::kInternal, "a fake launch");
  Header* header = FindHeader(update);
  const Judgement judgement =
      Judge(header, *update.token, LayoutOf(update.fingerprint, *update.part));
  *update.new_token = *update.token;
  if (!IsAccepted(judgement.verdict)) return Report(update, judgement.verdict, header);
  if (update.kind.output == Output::kOpen) {
    *update.new_token = Open(header, judgement, /*count=*/0);
    return;
  }
  *update.new_token = Advance(header, judgement, /*count=*/0);
  const bool is_fresh = judgement.verdict == Verdict::kFresh;
  StepSlot(update, *header, is_fresh ? -1 : judgement.source, judgement.target,
           update.new_token->version);
}

void LaunchRest(const CudaUpdate& update) {
  if (PAGED_FAILS("launch")) throw CudaError(StatusCode::kInternal, "a fake launch");
  Header* header = FindHeader(update);
  const int32_t slot = FindOpenSlot(header, *update.new_token);
  if (slot < 0) return;
  StepSlot(update, *header, FindOpenSource(*header, slot), slot, -update.new_token->version);
  *update.new_token = Close(header, slot);
}

void LaunchWriteToken(Token token, Token* destination, int, Stream) { *destination = token; }

void LaunchWriteSegments(const SegmentTable& segments, SegmentTable* destination, int, Stream) {
  if (PAGED_FAILS("launch")) throw CudaError(StatusCode::kInternal, "a fake launch");
  *destination = segments;
}

void CheckFits(const Source&, const Request&) {}

void Fill(const Source&, const Request&, Arena& arena) {
  const auto sample =
      std::make_shared<std::vector<uint8_t>>(kSample, Pattern(arena.header.handle, 1));
  const auto pinned = arena.memory->Pin({sample, sample->data()}, kSample);
  const int64_t nbytes = arena.memory->geometry().slot_bytes;
  for (int64_t at = 0; at + kSample <= nbytes; at += kStride) {
    arena.memory->Write(0, at, kSample, sample->data());
  }
  arena.header.version = arena.header.versions[0] = arena.header.started = 1;
}

}  // namespace paged_optax
