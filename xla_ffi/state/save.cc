// See save.h. The file is cut into pieces of one size, whatever arrays they hold: a disk is as fast
// with many small arrays as with a few large ones.
#include "state/save.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "base/crc32.h"
#include "base/threads.h"

namespace paged_optax {

Saver::Saver(const std::string& path, std::vector<SavedArray> arrays)
    : arrays_(std::move(arrays)), ends_(arrays_.size()) {
  std::transform(arrays_.begin(), arrays_.end(), ends_.begin(),
                 [](const SavedArray& array) { return array.nbytes; });
  std::partial_sum(ends_.begin(), ends_.end(), ends_.begin());
  nbytes_ = ends_.empty() ? 0 : ends_.back();
  parts_.resize((nbytes_ + kDiskPiece - 1) / kDiskPiece);
  file_.emplace(path, nbytes_);
}

int64_t Saver::SizeOf(int64_t piece) const {
  return std::min(kDiskPiece, nbytes_ - piece * kDiskPiece);
}

void Saver::Read(int64_t piece, DiskBuffer& buffer) {
  const int64_t begin = piece * kDiskPiece, end = begin + SizeOf(piece);
  uint8_t* const bytes = buffer.Reserve(kDiskPiece);
  size_t array = std::upper_bound(ends_.begin(), ends_.end(), begin) - ends_.begin();
  for (int64_t at = begin; at < end; ++array) {
    const int64_t size = std::min(ends_[array], end) - at;
    if (size == 0) continue;
    arrays_[array].read(at - (ends_[array] - arrays_[array].nbytes), size, bytes + (at - begin));
    parts_[piece].push_back({array, size, Crc32(0, bytes + (at - begin), size)});
    at += size;
  }
}

void Saver::Write(int64_t piece, DiskBuffer& buffer) const {
  file_->Write(piece * kDiskPiece, buffer.Reserve(kDiskPiece), SizeOf(piece));
}

void Saver::EndReading() {
  for (SavedArray& array : arrays_) array.read = nullptr;
}

std::vector<uint32_t> Saver::Sums() const {
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

std::vector<uint32_t> SaveArrays(const std::string& path, const std::vector<SavedArray>& arrays) {
  Saver saver(path, arrays);
  ForEachInParallel(
      saver.num_pieces(), NumDiskThreads(), [] { return DiskBuffer(); },
      [&](int64_t piece, DiskBuffer& buffer) {
        saver.Read(piece, buffer);
        saver.Write(piece, buffer);
      });
  return saver.Sums();
}

}  // namespace paged_optax
