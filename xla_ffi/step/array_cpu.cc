// See array_cpu.h.
#include "step/array_cpu.h"

#include "base/cpu.h"
#include "base/math.h"
#include "step/array.h"
#include "step/lane_cpu.h"

namespace paged_optax {
namespace {

constexpr int kLane = kCpuLane;

int CountOf(const ArrayWork& work, int64_t start) {
  const int64_t left = work.place.size - start;
  return left < kLane ? static_cast<int>(left) : kLane;
}

template <class Format>
PAGED_CLONES void LoadBlocks(const ArrayWork& work, int64_t begin, int64_t end) {
  alignas(64) float values[kLane];
  Lane<Values, Format, kLane> lane;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t start = block * kBlockSize;
    LoadLane(work.base, work.place.region.Locate(work.place.first_block + block), lane);
    DecodeArray<Format>(kCpuTables<Format>, lane, values);
    StoreBlock(work.data, work.dtype, start, CountOf(work, start), values);
  }
}

template <class Format>
PAGED_CLONES void StoreBlocks(const ArrayWork& work, int64_t begin, int64_t end) {
  alignas(64) float values[kLane];
  Lane<Values, Format, kLane> lane;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t start = block * kBlockSize;
    LoadBlock(work.data, work.dtype, start, CountOf(work, start), values);
    EncodeArray<Format>(IeeeMath(), kCpuTables<Format>, DitherStart(work.key, start) + work.phase,
                        values, lane, WholeBlock());
    StoreLane(lane, work.place.region.Locate(work.place.first_block + block), work.base);
  }
}

template <class Format, bool kStores>
void Run(const ArrayWork& work, int64_t begin, int64_t end) {
  const ScopedIeeeMode mode;
  kStores ? StoreBlocks<Format>(work, begin, end) : LoadBlocks<Format>(work, begin, end);
}

}  // namespace

ArrayRun FindArrayRun(int64_t format, bool stores) {
  ArrayRun found = nullptr;
  Visit(Formats(), static_cast<int>(format), [&](auto chosen) {
    using Format = typename decltype(chosen)::type;
    found = stores ? &Run<Format, true> : &Run<Format, false>;
  });
  return found;
}

}  // namespace paged_optax
