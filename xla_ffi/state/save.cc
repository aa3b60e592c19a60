// See save.h. The file is cut into pieces of one size, whatever arrays they hold: a disk is as fast
// with many small arrays as with a few large ones.
#include "state/save.h"

#include <algorithm>
#include <numeric>

#include "base/crc32.h"
#include "base/disk_file.h"
#include "base/threads.h"

namespace paged_optax {
namespace {

// A part of an array that lies in one piece.
struct Part {
  size_t array;
  int64_t nbytes;
  uint32_t crc;
};

class Saver {
 public:
  Saver(const std::string& path, const std::vector<SavedArray>& arrays)
      : arrays_(arrays), ends_(arrays.size()) {
    std::transform(arrays.begin(), arrays.end(), ends_.begin(),
                   [](const SavedArray& array) { return array.nbytes; });
    std::partial_sum(ends_.begin(), ends_.end(), ends_.begin());
    nbytes_ = ends_.empty() ? 0 : ends_.back();
    parts_.resize((nbytes_ + kDiskPiece - 1) / kDiskPiece);
    file_.emplace(path, nbytes_);
  }

  int64_t num_pieces() const { return static_cast<int64_t>(parts_.size()); }

  void Save(int64_t piece, DiskBuffer& buffer) {
    const int64_t begin = piece * kDiskPiece, end = std::min(begin + kDiskPiece, nbytes_);
    uint8_t* const bytes = buffer.Reserve(kDiskPiece);
    size_t array = std::upper_bound(ends_.begin(), ends_.end(), begin) - ends_.begin();
    for (int64_t at = begin; at < end; ++array) {
      const int64_t size = std::min(ends_[array], end) - at;
      if (size == 0) continue;
      arrays_[array].read(at - (ends_[array] - arrays_[array].nbytes), size, bytes + (at - begin));
      parts_[piece].push_back({array, size, Crc32(0, bytes + (at - begin), size)});
      at += size;
    }
    file_->Write(begin, bytes, end - begin);
  }

  std::vector<uint32_t> Sums() const {
    std::vector<uint32_t> sums(arrays_.size(), 0);
    for (const std::vector<Part>& parts : parts_) {
      for (const Part& part : parts) {
        sums[part.array] = JoinCrc32(sums[part.array], part.crc, part.nbytes);
      }
    }
    for (size_t i = 0; i < sums.size(); ++i) {
      if (arrays_[i].check) arrays_[i].check(sums[i]);
    }
    return sums;
  }

 private:
  const std::vector<SavedArray>& arrays_;
  std::vector<int64_t> ends_;  // of the arrays, in the file
  int64_t nbytes_ = 0;
  std::vector<std::vector<Part>> parts_;  // of each piece, in order
  std::optional<OutputFile> file_;
};

}  // namespace

std::vector<uint32_t> SaveArrays(const std::string& path, const std::vector<SavedArray>& arrays) {
  Saver saver(path, arrays);
  ForEachInParallel(
      saver.num_pieces(), NumDiskThreads(), [] { return DiskBuffer(); },
      [&](int64_t piece, DiskBuffer& buffer) { saver.Save(piece, buffer); });
  return saver.Sums();
}

}  // namespace paged_optax
