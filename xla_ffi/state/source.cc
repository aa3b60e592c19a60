// See source.h.
#include "state/source.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "base/crc32.h"
#include "base/faults.h"
#include "base/status.h"
#include "formats/formats.h"
#include "layout/layout.h"
#include "rules/rules.h"
#include "state/tiling.h"

namespace paged_optax {
namespace {

constexpr int64_t kMaxElements = kMaxBlocks * kBlockSize;  // 10^12
constexpr size_t kMaxRank = 64;

[[noreturn]] void RefuseLeaf(const Source& source, size_t leaf, const std::string& problem) {
  throw StatusError(StatusCode::kInvalidArgument,
                    "paged_optax: the moments of " + source.NameOf(leaf) + " " + problem);
}

// The arrays of a piece, whose box has `size` elements.
bool HasSizes(const Source& source, const SourceLeaf& leaf, const Piece& piece, int64_t size) {
  const FormatInfo& format = kFormats[leaf.format];
  const size_t num_states = AllRules()[source.rule].states.size();
  const auto are = [](const std::vector<Data>& arrays, size_t count, int64_t nbytes) {
    return arrays.size() == count &&
           std::all_of(arrays.begin(), arrays.end(),
                       [&](const Data& data) { return data.nbytes == nbytes; });
  };
  return are(piece.codes, num_states, size * format.code_bytes) &&
         are(piece.words, num_states * format.words_per_state,
             NumBlocks(size) * static_cast<int64_t>(sizeof(uint32_t))) &&
         piece.residuals.has_value() == source.has_residuals &&
         (!source.has_residuals || piece.residuals->nbytes == size);
}

void CheckLeaf(const Source& source, size_t i) {
  const SourceLeaf& leaf = source.leaves[i];
  if (leaf.format < 0 || leaf.format >= static_cast<int>(kFormats.size())) {
    RefuseLeaf(source, i, "have no known format");
  }
  if (leaf.shape.size() > kMaxRank || !ProductOf(leaf.shape)) {
    RefuseLeaf(source, i, "have no possible shape");
  }
  for (const Piece& piece : leaf.pieces) {
    const std::optional<int64_t> size = ProductOf(piece.box.shape);
    if (!size || !HasSizes(source, leaf, piece, *size)) {
      RefuseLeaf(source, i, "have arrays of a number or size that does not fit their box");
    }
  }
  std::vector<const Box*> boxes;
  for (const Piece& piece : leaf.pieces) boxes.push_back(&piece.box);
  if (!Tiling::Make(leaf.shape, boxes)) {
    RefuseLeaf(source, i,
               "are not complete: their boxes do not tile the leaf (is a file missing?)");
  }
}

}  // namespace

std::string Source::NameOf(size_t leaf) const {
  return leaves[leaf].name.empty() ? "leaf " + std::to_string(leaf) : leaves[leaf].name;
}

std::optional<int64_t> ProductOf(const std::vector<int64_t>& shape) {
  const auto is_out = [](int64_t n) { return n < 0 || n > kMaxElements; };
  if (std::any_of(shape.begin(), shape.end(), is_out)) return std::nullopt;
  if (std::count(shape.begin(), shape.end(), 0) != 0) return 0;
  int64_t size = 1;
  for (const int64_t n : shape) {
    if (n > kMaxElements / size) return std::nullopt;
    size *= n;
  }
  return size;
}

void CheckSource(const Source& source) {
  if (source.rule < 0 || source.rule >= Rules::kSize) {
    throw StatusError(StatusCode::kInvalidArgument,
                      "paged_optax: the moments belong to no known optimizer");
  }
  if (source.leaves.empty()) {
    throw StatusError(StatusCode::kInvalidArgument, "paged_optax: there are moments of no leaf");
  }
  for (size_t i = 0; i < source.leaves.size(); ++i) CheckLeaf(source, i);
}

// A file that shrinks under a mapping of it would end the process, so files are read.
DataReader::DataReader(const Data& data) : data_(data) {
  if (data.bytes != nullptr || data.nbytes == 0) return;
  do {
    // A pipe must not wait.
    fd_ = PAGED_CALL(open, -1, data.path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  } while (fd_ < 0 && errno == EINTR);
  if (fd_ < 0) Refuse(std::strerror(errno));
  struct stat status;
  const bool is_file = PAGED_CALL(fstat, -1, fd_, &status) == 0 && S_ISREG(status.st_mode);
  if (is_file && data.offset >= 0 && data.nbytes <= status.st_size &&
      data.offset <= status.st_size - data.nbytes) {
    return;
  }
  close(fd_);  // no destructor runs after this
  Refuse(is_file ? "the file is too short" : "this is not a file");
}

DataReader::~DataReader() {
  if (fd_ >= 0) close(fd_);
}

void DataReader::Read(int64_t nbytes, uint8_t* destination) {
  if (nbytes == 0) return;
  if (nbytes > data_.nbytes - done_) Refuse("the array is too short");
  if (data_.bytes != nullptr) {
    std::memcpy(destination, data_.bytes + done_, nbytes);
  }
  for (int64_t got = 0; data_.bytes == nullptr && got < nbytes;) {
    const ssize_t part =
        PAGED_CALL(pread, -1, fd_, destination + got, nbytes - got, data_.offset + done_ + got);
    if (part < 0 && errno == EINTR) continue;
    if (part < 0) Refuse(std::strerror(errno));
    if (part == 0) Refuse("the file is too short");
    got += part;
  }
  done_ += nbytes;
  if (!data_.crc) return;
  crc_ = Crc32(crc_, destination, nbytes);
  if (done_ == data_.nbytes && crc_ != *data_.crc) Refuse("the checksum is another");
}

void DataReader::Refuse(const std::string& problem) const {
  const std::string place = data_.bytes != nullptr ? "in memory"
                                                   : "in '" + data_.path + "' from byte " +
                                                         std::to_string(data_.offset) + " on";
  throw StatusError(StatusCode::kInvalidArgument, "paged_optax: " + std::to_string(data_.nbytes) +
                                                      " bytes of a checkpoint's moments " + place +
                                                      " cannot be read: " + problem);
}

}  // namespace paged_optax
