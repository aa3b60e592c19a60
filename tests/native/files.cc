// See files.h.
#include "files.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <system_error>
#include <vector>

#include "base/status.h"
#include "layout/geometry.h"
#include "memory/memory.h"
#include "state/background_save.h"
#include "state/load.h"
#include "state/save.h"

namespace paged_optax {
namespace {

using Sizes = std::vector<int64_t>;
// Odd ones; of many, together more pieces than there are buffers.
const Sizes kFew = {1, 4095, 0, kDiskPiece + 77, 300, 5}, kMany = {9, 12 * kDiskPiece + 1, 4096};
const char kPath[] = "arrays";
constexpr int64_t kRun = 4096;  // of equal bytes

uint8_t ByteOf(size_t array, int64_t at) {
  return static_cast<uint8_t>(array * 31 + at / kRun * 7 + at / kDiskPiece);
}

std::vector<SavedArray> Arrays(const Sizes& sizes) {
  std::vector<SavedArray> arrays;
  for (size_t a = 0; a < sizes.size(); ++a) {
    arrays.push_back({sizes[a], [a](int64_t begin, int64_t nbytes, uint8_t* bytes) {
                        for (int64_t i = 0, part; i < nbytes; i += part) {
                          part = std::min(nbytes - i, kRun - (begin + i) % kRun);
                          std::memset(bytes + i, ByteOf(a, begin + i), part);
                        }
                      }});
  }
  return arrays;
}

void Load(const Sizes& sizes, const std::vector<uint32_t>& sums) {
  std::vector<Data> arrays(sizes.size());
  int64_t offset = 0;
  for (size_t a = 0; a < sizes.size(); ++a) {
    arrays[a].nbytes = sizes[a];
    arrays[a].path = arrays[a].shown_path = kPath;
    arrays[a].offset = offset;
    arrays[a].crc = sums[a];
    offset += sizes[a];
  }
  std::vector<LoadItem> items;
  for (size_t a = 0; a < sizes.size(); ++a) {
    int64_t begin = 0;
    do {
      const int64_t nbytes = std::min(sizes[a] - begin, kDiskPiece / 2);
      items.push_back({{{&arrays[a], begin, nbytes}},
                       true,
                       [a, begin, nbytes](const std::vector<uint8_t*>& bytes) {
                         for (int64_t i = 0; i < nbytes; i += 1021) {
                           if (bytes[0][i] != ByteOf(a, begin + i)) std::abort();
                         }
                       }});
      begin += nbytes;
    } while (begin < sizes[a]);
  }
  const auto target = MakeManagedMemory(MakeGeometry(kChunkBytes, 1), 0, 1, nullptr);
  LoadItems(items, *target);
}

// What it is to do, the second time if it fails the first.
template <class F>
auto Attempt(const F& action) {
  for (int i = 0;; ++i) {
    try {
      return action();
    } catch (const StatusError&) {
      if (i == 1) throw;
    } catch (const std::system_error& error) {
      if (i == 1) throw StatusError(StatusCode::kInternal, error.what());
    }
  }
}

}  // namespace

void SaveAndLoad(bool many) {
  const Sizes& sizes = many ? kMany : kFew;
  std::ofstream(kPath, std::ios::trunc).close();
  const auto sums = Attempt([&] { return SaveArrays(kPath, Arrays(sizes)); });
  Attempt([&] { Load(sizes, sums); });
  std::ofstream(kPath, std::ios::trunc).close();
  const auto others = Attempt([&] { return BackgroundSave(kPath, Arrays(sizes), 0).Finish(); });
  if (others != sums) std::abort();
  Attempt([&] { Load(sizes, others); });
  // Nobody waits for this one.
  Attempt([&] { BackgroundSave(kPath, Arrays(sizes), int64_t{1} << 40); });
}

}  // namespace paged_optax
