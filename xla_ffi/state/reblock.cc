// See reblock.h.
#include "state/reblock.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <optional>
#include <vector>

#include "base/crc32.h"
#include "base/threads.h"
#include "state/tiling.h"

namespace paged_optax {
namespace {

// An array in memory, out of its file if it is in one.
class Loaded {
 public:
  explicit Loaded(const Data& data) : bytes_(data.bytes) {
    if (bytes_ != nullptr || data.nbytes == 0) return;
    own_.reset(new uint8_t[data.nbytes]);
    bytes_ = own_.get();
    const DataReader reader(data, /*is_read_once=*/false);  // devices share what they need of it
    DiskBuffer scratch;
    reader.Read(0, data.nbytes, own_.get(), scratch);
    if (data.crc) CheckSum(data, Crc32(0, own_.get(), data.nbytes));
  }
  const uint8_t* bytes() const { return bytes_; }

 private:
  const uint8_t* bytes_;
  std::unique_ptr<uint8_t[]> own_ = nullptr;
};

struct LoadedPiece {
  int64_t size = 0;
  std::vector<Loaded> codes = {}, words = {}, residuals = {};

  int64_t CountOf(int64_t block) const { return std::min(kBlockSize, size - block * kBlockSize); }

  uint32_t WordOf(size_t state, int64_t block) const {
    uint32_t word;  // buffers may lie anywhere
    std::memcpy(&word, words[state].bytes() + block * 4, sizeof(word));
    return word;
  }
};

LoadedPiece Load(const Piece& piece) {
  LoadedPiece loaded{*ProductOf(piece.box.shape)};
  for (const Data& data : piece.codes) loaded.codes.emplace_back(data);
  for (const Data& data : piece.words) loaded.words.emplace_back(data);
  if (piece.residuals) loaded.residuals.emplace_back(*piece.residuals);
  return loaded;
}

bool Overlaps(const Box& one, const Box& other) {
  for (size_t d = 0; d < one.start.size(); ++d) {
    if (one.start[d] >= other.start[d] + other.shape[d]) return false;
    if (other.start[d] >= one.start[d] + one.shape[d]) return false;
  }
  return true;
}

// Blocks of the pieces in float32. Remembers the last one of some pieces: the way through a target
// comes back to the same pieces.
class Decoder {
 public:
  Decoder(const LeafWork& work, const std::vector<LoadedPiece>& pieces, size_t num_states)
      : work_(work),
        pieces_(pieces),
        num_states_(num_states),
        code_bytes_(kFormats[work.from().format].code_bytes),
        transcoder_(FindTranscoder(work.source.rule, work.from().format)),
        codes_(num_states * kBlockSize * sizeof(float)),
        rows_(num_states),
        words_(num_states) {
    entries_.resize(std::min<size_t>(pieces.size(), kEntries));
    for (Entry& entry : entries_) entry.values.reset(new float[num_states * kBlockSize]);
  }

  // A row of kBlockSize for each state, until the next call.
  const float* Decode(int32_t piece, int64_t block) {
    Entry& entry = entries_[piece % entries_.size()];
    if (entry.piece == piece && entry.block == block) return entry.values.get();
    entry.piece = piece;
    entry.block = block;
    const LoadedPiece& from = pieces_[piece];
    const int64_t count = from.CountOf(block);
    for (size_t s = 0; s < num_states_; ++s) {
      uint8_t* row = codes_.data() + s * kBlockSize * code_bytes_;
      const int64_t nbytes = count * code_bytes_;
      std::memcpy(row, from.codes[s].bytes() + block * kBlockSize * code_bytes_, nbytes);
      std::memset(row + nbytes, transcoder_.zero(static_cast<int32_t>(s)),
                  kBlockSize * code_bytes_ - nbytes);
      if (!transcoder_.may_store_codes(static_cast<int32_t>(s), row, count)) work_.RefuseValues();
      rows_[s] = row;
    }
    for (size_t s = 0; s < from.words.size(); ++s) {
      words_[s] = from.WordOf(s, block);
      if (!transcoder_.may_store_word(static_cast<int32_t>(s), words_[s], count < kBlockSize)) {
        work_.RefuseValues();
      }
    }
    transcoder_.decode(rows_.data(), words_.data(),
                       reinterpret_cast<BlockValues>(entry.values.get()));
    for (size_t s = 0; s < num_states_; ++s) {
      if (!transcoder_.may_store_values(static_cast<int32_t>(s),
                                        entry.values.get() + s * kBlockSize, kBlockSize)) {
        work_.RefuseValues();
      }
    }
    return entry.values.get();
  }

 private:
  static constexpr size_t kEntries = 64;
  struct Entry {
    int32_t piece = -1;
    int64_t block = -1;
    std::unique_ptr<float[]> values = nullptr;
  };

  const LeafWork& work_;
  const std::vector<LoadedPiece>& pieces_;
  const size_t num_states_;
  const int64_t code_bytes_;
  const Transcoder transcoder_;
  std::vector<uint8_t> codes_;  // of one block
  std::vector<const uint8_t*> rows_;
  std::vector<uint32_t> words_;
  std::vector<Entry> entries_;
};

// Fills blocks of one leaf, for one thread.
class Reblocker {
 public:
  Reblocker(const LeafWork& work, const std::vector<LoadedPiece>& pieces, const Tiling::Walk& walk)
      : work_(work),
        pieces_(pieces),
        walk_(walk),
        num_states_(work.shape.num_states),
        decoder_(work, pieces, num_states_),
        rows_(num_states_),
        values_(new float[num_states_ * kBlockSize]) {}

  // Block `b` of the window, which is `block` of the target.
  void FillBlock(Window& window, int64_t b, int64_t block) {
    const int64_t begin = block * kBlockSize, end = std::min(begin + kBlockSize, walk_.size());
    runs_.clear();
    walk_.ForEachRun(begin, end, [&](const Run& run) { runs_.push_back(run); });
    CopyResiduals(window, b, begin);
    if (IsStoredBlock(end - begin)) {
      CopyBlock(window, b);
    } else {
      Requantize(window, b, begin);
    }
  }

 private:
  bool IsStoredBlock(int64_t count) const {
    if (runs_.size() != 1 || work_.from().format != work_.info.format) return false;
    const Run& run = runs_[0];
    return run.source % kBlockSize == 0 &&
           pieces_[run.piece].CountOf(run.source / kBlockSize) == count;
  }

  void CopyBlock(Window& window, int64_t b) const {
    const Run& run = runs_[0];
    const LoadedPiece& from = pieces_[run.piece];
    const int64_t code_bytes = work_.shape.code_bytes;
    for (int32_t s = 0; s < num_states_; ++s) {
      std::memcpy(window.codes(s) + b * kBlockSize * code_bytes,
                  from.codes[s].bytes() + run.source * code_bytes, run.length * code_bytes);
    }
    for (size_t s = 0; s < from.words.size(); ++s) {
      window.words()[b * from.words.size() + s] = from.WordOf(s, run.source / kBlockSize);
    }
  }

  void CopyResiduals(Window& window, int64_t b, int64_t begin) const {
    if (work_.shape.residual_bytes == 0) return;
    for (const Run& run : runs_) {
      if (pieces_[run.piece].residuals.empty()) continue;  // a window starts with those of zero
      std::memcpy(window.residuals() + b * kBlockSize + (run.target - begin),
                  pieces_[run.piece].residuals[0].bytes() + run.source, run.length);
    }
  }

  void Requantize(Window& window, int64_t b, int64_t begin) {
    std::fill_n(values_.get(), num_states_ * kBlockSize, 0.0f);
    for (const Run& run : runs_) {
      for (int64_t done = 0, part; done < run.length; done += part) {
        const int64_t at = run.source + done, place = at % kBlockSize;
        part = std::min(run.length - done, kBlockSize - place);
        const float* from = decoder_.Decode(run.piece, at / kBlockSize);
        for (int32_t s = 0; s < num_states_; ++s) {
          std::copy_n(from + s * kBlockSize + place, part,
                      values_.get() + s * kBlockSize + (run.target - begin + done));
        }
      }
    }
    for (int32_t s = 0; s < num_states_; ++s) {
      rows_[s] = window.codes(s) + b * kBlockSize * work_.shape.code_bytes;
    }
    work_.transcoder.encode(reinterpret_cast<BlockValues>(values_.get()), rows_.data(),
                            window.words() + b * work_.shape.num_words);
  }

  const LeafWork& work_;
  const std::vector<LoadedPiece>& pieces_;
  const Tiling::Walk& walk_;
  const int32_t num_states_;
  Decoder decoder_;
  std::vector<uint8_t*> rows_;  // of the block, in the window
  std::unique_ptr<float[]> values_;
  std::vector<Run> runs_;
};

}  // namespace

void Reblock(const LeafWork& work) {
  const std::vector<Piece>& pieces = work.from().pieces;
  std::vector<const Box*> boxes;
  for (const Piece& piece : pieces) boxes.push_back(&piece.box);
  const std::optional<Tiling> tiling = Tiling::Make(work.from().shape, boxes);
  const Tiling::Walk walk(*tiling, work.box);
  if (walk.size() == 0) return;
  std::vector<LoadedPiece> loaded(pieces.size());
  ForEachInParallel(static_cast<int64_t>(pieces.size()), [&](int64_t i) {
    if (Overlaps(pieces[i].box, work.box)) loaded[i] = Load(pieces[i]);
  });
  ForEachInParallel(work.num_windows(), [&](int64_t w) {
    Window window(work.shape);
    Reblocker reblocker(work, loaded, walk);
    work.FillWindow(w, window, [&](int64_t first) {
      for (int64_t b = 0; b < window.num_blocks(); ++b) {
        reblocker.FillBlock(window, b, first + b);
      }
    });
  });
}

}  // namespace paged_optax
