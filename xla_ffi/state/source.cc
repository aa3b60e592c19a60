// See source.h.
#include "state/source.h"

#include <algorithm>
#include <cstring>
#include <system_error>
#include <utility>

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

[[noreturn]] void RefuseData(const Data& data, const std::string& problem) {
  const std::string place = data.bytes != nullptr ? "in memory"
                                                  : "in '" + data.shown_path + "' from byte " +
                                                        std::to_string(data.offset) + " on";
  throw StatusError(StatusCode::kInvalidArgument, "paged_optax: " + std::to_string(data.nbytes) +
                                                      " bytes of a checkpoint's moments " + place +
                                                      " cannot be read: " + problem);
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

namespace {

// A file that shrinks under a mapping of it would end the process, so files are read.
std::shared_ptr<const InputFile> OpenFile(const Data& data, bool is_read_once) {
  if (data.bytes != nullptr || data.nbytes == 0) return nullptr;
  try {
    return std::make_shared<const InputFile>(data.path, is_read_once);
  } catch (const std::system_error& error) {
    RefuseData(data, std::strerror(error.code().value()));
  }
}

}  // namespace

DataReader::DataReader(const Data& data, bool is_read_once)
    : DataReader(data, OpenFile(data, is_read_once)) {}

DataReader::DataReader(const Data& data, std::shared_ptr<const InputFile> file)
    : data_(data), file_(std::move(file)) {
  if (file_ == nullptr) return;
  if (!file_->is_file()) RefuseData(data, "this is not a file");
  if (data.offset < 0 || data.nbytes > file_->nbytes() ||
      data.offset > file_->nbytes() - data.nbytes) {
    RefuseData(data, "the file is too short");
  }
}

// That `read` reads so many bytes.
template <class F>
void DataReader::Check(int64_t nbytes, const F& read) const {
  int64_t got = 0;
  try {
    got = read();
  } catch (const std::system_error& error) {
    RefuseData(data_, std::strerror(error.code().value()));
  }
  if (got != nbytes) RefuseData(data_, "the file is too short");
}

void DataReader::Read(int64_t begin, int64_t nbytes, uint8_t* destination,
                      DiskBuffer& scratch) const {
  if (nbytes == 0) return;
  if (begin < 0 || nbytes > data_.nbytes - begin) RefuseData(data_, "the array is too short");
  if (data_.bytes != nullptr) {
    std::memcpy(destination, data_.bytes + begin, nbytes);
    return;
  }
  Check(nbytes, [&] { return file_->Read(data_.offset + begin, nbytes, destination, scratch); });
}

void DataReader::ReadPages(int64_t begin, int64_t nbytes, uint8_t* pages) const {
  Check(nbytes, [&] { return file_->ReadPages(data_.offset + begin, nbytes, pages); });
}

void CheckSum(const Data& data, uint32_t crc) {
  if (data.crc && crc != *data.crc) RefuseData(data, "the checksum is another");
}

}  // namespace paged_optax
