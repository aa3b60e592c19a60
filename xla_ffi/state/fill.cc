// See fill.h.
#include "state/fill.h"

#include <algorithm>
#include <cstring>

#include "base/status.h"
#include "base/threads.h"
#include "rules/rules.h"
#include "state/shards.h"
#include "state/tiling.h"
#include "state/window.h"

namespace paged_optax {
namespace {

constexpr int64_t kWindowBlocks = 2048;

// What every block of a leaf is filled with the help of.
struct LeafWork {
  const Source& source;
  size_t leaf;
  const Signature::LeafInfo& info;  // of the arena's leaf
  Box box;
  WindowShape shape;
  Transcoder transcoder;
  const Region& region;
  Memory& memory;

  const SourceLeaf& from() const { return source.leaves[leaf]; }
  int64_t num_blocks() const { return NumBlocks(info.size); }

  [[noreturn]] void RefuseValues() const {
    throw StatusError(StatusCode::kInvalidArgument,
                      "paged_optax: the checkpoint's moments of " + source.NameOf(leaf) +
                          " have values that no step stores, so it is damaged. Nothing was changed;"
                          " restore another checkpoint, or start with init(params).");
  }

  // The window, from block `first` on, into the arena.
  void Write(const Window& window, int64_t first) const {
    WriteWindow(window, region, info.first_block + first, memory, /*slot=*/0);
  }

  // Calls body(window, first, count) for consecutive blocks.
  template <class F>
  void ForWindow(int64_t index, Window& window, const F& body) const {
    const int64_t first = index * kWindowBlocks;
    const int64_t count = std::min(kWindowBlocks, num_blocks() - first);
    window.Reset(count, std::min(count * kBlockSize, info.size - first * kBlockSize), transcoder);
    body(first);
    Write(window, first);
  }

  int64_t NumWindows() const { return (num_blocks() + kWindowBlocks - 1) / kWindowBlocks; }
};

// ---------------------------------------------------------------------------------------------------
// A box as it was stored
// ---------------------------------------------------------------------------------------------------

const Piece* FindSameBox(const LeafWork& work) {
  const SourceLeaf& leaf = work.from();
  if (leaf.format != work.info.format) return nullptr;
  if (work.source.has_residuals != (work.shape.residual_bytes != 0)) return nullptr;
  const auto found = std::find_if(leaf.pieces.begin(), leaf.pieces.end(), [&](const Piece& piece) {
    return piece.box.start == work.box.start && piece.box.shape == work.box.shape;
  });
  return found == leaf.pieces.end() ? nullptr : &*found;
}

// Whether all that a window holds may be stored. The last block is padded if the leaf is at its
// end.
bool MayStore(const LeafWork& work, Window& window) {
  const int32_t num_words = work.shape.num_words;
  for (int64_t i = 0; i < window.num_blocks() * num_words; ++i) {
    const bool is_padded = (i / num_words + 1) * kBlockSize > window.size();
    if (!work.transcoder.may_store(static_cast<int32_t>(i % num_words), window.words()[i],
                                   is_padded)) {
      return false;
    }
  }
  if (num_words != 0) return true;
  for (int32_t s = 0; s < work.shape.num_states; ++s) {
    if (!work.transcoder.may_store_values(s, reinterpret_cast<float*>(window.codes(s)),
                                          window.size())) {
      return false;
    }
  }
  return true;
}

void Copy(const LeafWork& work, const Piece& piece) {
  std::vector<std::unique_ptr<DataReader>> codes, words;
  for (const Data& data : piece.codes) codes.push_back(std::make_unique<DataReader>(data));
  for (const Data& data : piece.words) words.push_back(std::make_unique<DataReader>(data));
  std::unique_ptr<DataReader> residuals;
  if (piece.residuals) residuals = std::make_unique<DataReader>(*piece.residuals);
  Window window(work.shape);
  std::vector<uint32_t> row(kWindowBlocks);
  for (int64_t w = 0; w < work.NumWindows(); ++w) {
    work.ForWindow(w, window, [&](int64_t) {
      for (size_t s = 0; s < codes.size(); ++s) {
        codes[s]->Read(window.size() * work.shape.code_bytes, window.codes(s));
      }
      for (size_t s = 0; s < words.size(); ++s) {
        words[s]->Read(window.num_blocks() * 4, reinterpret_cast<uint8_t*>(row.data()));
        for (int64_t b = 0; b < window.num_blocks(); ++b) {
          window.words()[b * words.size() + s] = row[b];
        }
      }
      if (residuals != nullptr) residuals->Read(window.size(), window.residuals());
      if (!MayStore(work, window)) work.RefuseValues();
    });
  }
}

// ---------------------------------------------------------------------------------------------------
// Another box, or another format
// ---------------------------------------------------------------------------------------------------

// An array in memory, out of its file if it is in one.
class Loaded {
 public:
  explicit Loaded(const Data& data) : bytes_(data.bytes) {
    if (bytes_ != nullptr || data.nbytes == 0) return;
    own_.reset(new uint8_t[data.nbytes]);
    bytes_ = own_.get();
    DataReader(data).Read(data.nbytes, own_.get());
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
    std::vector<const uint8_t*> codes;
    for (size_t s = 0; s < num_states_; ++s) {
      uint8_t* row = codes_.data() + s * kBlockSize * code_bytes_;
      const int64_t nbytes = count * code_bytes_;
      std::memcpy(row, from.codes[s].bytes() + block * kBlockSize * code_bytes_, nbytes);
      std::memset(row + nbytes, transcoder_.zero(static_cast<int32_t>(s)),
                  kBlockSize * code_bytes_ - nbytes);
      codes.push_back(row);
    }
    for (size_t s = 0; s < from.words.size(); ++s) {
      words_[s] = from.WordOf(s, block);
      if (!transcoder_.may_store(static_cast<int32_t>(s), words_[s], count < kBlockSize)) {
        work_.RefuseValues();
      }
    }
    transcoder_.decode(codes.data(), words_.data(),
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
  std::vector<uint8_t> codes_;
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
    std::vector<uint8_t*> codes;
    for (int32_t s = 0; s < num_states_; ++s) {
      codes.push_back(window.codes(s) + b * kBlockSize * work_.shape.code_bytes);
    }
    work_.transcoder.encode(reinterpret_cast<BlockValues>(values_.get()), codes.data(),
                            window.words() + b * work_.shape.num_words);
  }

  const LeafWork& work_;
  const std::vector<LoadedPiece>& pieces_;
  const Tiling::Walk& walk_;
  const int32_t num_states_;
  Decoder decoder_;
  std::unique_ptr<float[]> values_;
  std::vector<Run> runs_;
};

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
  ForEachInParallel(work.NumWindows(), [&](int64_t w) {
    Window window(work.shape);
    Reblocker reblocker(work, loaded, walk);
    work.ForWindow(w, window, [&](int64_t first) {
      for (int64_t b = 0; b < window.num_blocks(); ++b) {
        reblocker.FillBlock(window, b, first + b);
      }
      if (!MayStore(work, window)) work.RefuseValues();
    });
  });
}

// ---------------------------------------------------------------------------------------------------
// Differences
// ---------------------------------------------------------------------------------------------------

[[noreturn]] void Refuse(const std::string& difference) {
  throw StatusError(StatusCode::kFailedPrecondition,
                    "paged_optax: this optimizer state was restored from a checkpoint " +
                        difference +
                        ". The restored moments are as they were; nothing was allocated.");
}

std::string ShapeText(const std::vector<int64_t>& shape) {
  std::string text = "(";
  for (size_t i = 0; i < shape.size(); ++i) {
    text += (i ? ", " : "") + std::to_string(shape[i]) + (shape.size() == 1 ? "," : "");
  }
  return text + ")";
}

void CheckLeaf(const Source& source, size_t i, const std::vector<int64_t>& whole, int8_t format,
               const std::vector<std::string>& names) {
  const SourceLeaf& leaf = source.leaves[i];
  if (i < names.size() && !leaf.name.empty() && !names[i].empty() && leaf.name != names[i]) {
    Refuse("whose leaf " + std::to_string(i) + " is " + leaf.name + ", and in this step it is " +
           names[i] + " (was the model changed?)");
  }
  if (leaf.shape != whole) {
    Refuse("whose moments of " + source.NameOf(i) + " have shape " + ShapeText(leaf.shape) +
           ", and in this step it has shape " + ShapeText(whole) + " (was the model changed?)");
  }
  if (leaf.format != format && !source.convert) {
    Refuse("whose moments of " + source.NameOf(i) + " are stored in the format '" +
           kFormats[leaf.format].name + "', and this step wants them in '" + kFormats[format].name +
           "' (was the optimizer's `quantization` changed? load_moments(..., convert=True) "
           "converts)");
  }
}

}  // namespace

void CheckFits(const Source& source, const Request& request) {
  const Signature& signature = *request.signature;
  if (source.rule != signature.rule()) {
    Refuse("of the optimizer '" + AllRules()[source.rule].name + "', and this step is one of '" +
           AllRules()[signature.rule()].name + "'");
  }
  const std::vector<Signature::LeafInfo> leaves = signature.Leaves();
  if (leaves.size() != source.leaves.size()) {
    Refuse("whose moments belong to " + std::to_string(source.leaves.size()) +
           " leaves, and this step has " + std::to_string(leaves.size()) +
           " (was the model changed?)");
  }
  if (source.has_residuals != signature.has_residuals() &&
      (source.has_residuals || !source.convert)) {
    Refuse(std::string("that ") + (source.has_residuals ? "has" : "does not have") +
           " residuals of 16-bit parameters, and this step " +
           (signature.has_residuals() ? "keeps some" : "keeps none") +
           " (was param_rounding='compensated' or the parameters' dtype changed?)");
  }
  const auto boxes = FindBoxes(leaves, signature.num_devices(), request.shards, request.part);
  if (!boxes) {
    Refuse(
        "and this step does not say which part of the parameters each device has (inside "
        "jax.shard_map or jax.pmap, or on a mesh with axes of several types). Run the first "
        "update under jax.jit with sharded arrays on a mesh of one type");
  }
  const std::vector<std::string> names = LeafNames(request.names, leaves.size()).paths();
  for (size_t i = 0; i < leaves.size(); ++i) {
    CheckLeaf(source, i, (*boxes)[i].whole, leaves[i].format, names);
  }
}

void Fill(const Source& source, const Request& request, Arena& arena) {
  const Signature& signature = arena.signature;
  const std::vector<Signature::LeafInfo> leaves = signature.Leaves();
  const auto boxes = FindBoxes(leaves, signature.num_devices(), request.shards, request.part);
  const Extent extent = signature.MakeExtent();
  std::vector<LeafWork> stored, others;
  std::vector<const Piece*> pieces;  // of `stored`
  for (size_t i = 0; i < leaves.size(); ++i) {
    const Region& region = extent.regions[leaves[i].format];
    const LeafWork work{source,
                        i,
                        leaves[i],
                        (*boxes)[i].box,
                        {region.shape.num_states, kFormats[leaves[i].format].code_bytes,
                         region.shape.num_words, region.shape.residual_bytes},
                        FindTranscoder(source.rule, leaves[i].format),
                        region,
                        *arena.memory};
    const Piece* piece = FindSameBox(work);
    (piece == nullptr ? others : stored).push_back(work);
    if (piece != nullptr) pieces.push_back(piece);
  }
  ForEachInParallel(static_cast<int64_t>(stored.size()),
                    [&](int64_t i) { Copy(stored[i], *pieces[i]); });
  for (const LeafWork& work : others) Reblock(work);
  arena.header.version = arena.header.versions[0] = 1;
}

}  // namespace paged_optax
