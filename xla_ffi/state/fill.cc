// See fill.h.
#include "state/fill.h"

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "layout/small_codes.h"
#include "state/leaf_work.h"
#include "state/load.h"
#include "state/reblock.h"
#include "state/shards.h"
#include "step/params.h"

namespace paged_optax {
namespace {

const Piece* FindSameBox(const LeafWork& work) {
  const SourceLeaf& leaf = work.from();
  if (leaf.format != work.info.format) return nullptr;
  if (work.source.has_residuals != (work.shape.residual_bytes != 0)) return nullptr;
  const auto found = std::find_if(leaf.pieces.begin(), leaf.pieces.end(), [&](const Piece& piece) {
    return piece.box.start == work.box.start && piece.box.shape == work.box.shape;
  });
  return found == leaf.pieces.end() ? nullptr : &*found;
}

// A leaf that is stored as the arena wants it: what comes out of its arrays goes into the arena
// without a window in between.
class Copying {
 public:
  Copying(const LeafWork& work, const Piece& piece) : work_(work), piece_(piece) {
    // Other devices read the same box if there are more of them than boxes.
    is_read_once_ = static_cast<int64_t>(work.from().pieces.size()) >= work.source.local_devices;
  }

  // In the order of a file.
  void AddItems(std::vector<LoadItem>& items) const {
    for (size_t s = 0; s < piece_.codes.size(); ++s) {
      AddElements(piece_.codes[s], work_.shape.code_bytes, items,
                  [this, s = static_cast<int32_t>(s)](int64_t first, int64_t size, uint8_t* bytes) {
                    WriteCodes(s, first, size, bytes);
                  });
    }
    AddWords(items);
    if (!piece_.residuals) return;
    AddElements(*piece_.residuals, 1, items, [this](int64_t first, int64_t size, uint8_t* bytes) {
      WriteResiduals(first, size, bytes);
    });
  }

 private:
  // Of an array with so many bytes an element. `write` is called with the number of the first
  // block and how many elements there are.
  template <class F>
  void AddElements(const Data& data, int64_t item, std::vector<LoadItem>& items,
                   const F& write) const {
    const int64_t most = kDiskPiece / (kBlockSize * item);  // blocks
    int64_t first = 0;
    do {  // once for an empty array, which has a checksum too
      const int64_t begin = first * kBlockSize,
                    size = std::min(most * kBlockSize, num_elements() - begin);
      items.push_back({{{&data, begin * item, size * item}},
                       is_read_once_,
                       [write, first, size](const std::vector<uint8_t*>& bytes) {
                         write(first, size, bytes[0]);
                       }});
      first += most;
    } while (first < work_.num_blocks());
  }

  void AddWords(std::vector<LoadItem>& items) const {
    if (piece_.words.empty()) return;
    const int64_t most = kDiskPiece / 4 / static_cast<int64_t>(piece_.words.size());
    int64_t first = 0;
    do {
      const int64_t count = std::min(most, work_.num_blocks() - first);
      std::vector<Span> spans;
      for (const Data& data : piece_.words) spans.push_back({&data, first * 4, count * 4});
      items.push_back({std::move(spans), is_read_once_,
                       [this, first, count](const std::vector<uint8_t*>& bytes) {
                         WriteWords(first, count, bytes);
                       }});
      first += most;
    } while (first < work_.num_blocks());
  }

  void WriteCodes(int32_t state, int64_t first, int64_t size, uint8_t* bytes) const {
    const int64_t item = work_.shape.code_bytes;
    if (const auto odd = reinterpret_cast<uintptr_t>(bytes) % item; odd != 0) {
      std::memmove(bytes - odd, bytes, size * item);
      bytes -= odd;
    }
    if (!work_.transcoder.may_store_codes(state, bytes, size)) work_.RefuseValues();
    std::vector<uint8_t> packed;
    WriteBlocks(first, size, kBlockSize * item, work_.transcoder.zero(state), bytes,
                [&](const BlockPlace& place, int64_t run, const uint8_t* from) {
                  const BlockShape& shape = work_.region.shape;
                  work_.memory.Write(/*slot=*/0, place.codes + state * place.state_stride,
                                     run * shape.state_bytes, PackCodes(shape, from, run, packed));
                });
  }

  void WriteResiduals(int64_t first, int64_t size, const uint8_t* bytes) const {
    WriteBlocks(first, size, kBlockSize, kZeroResidual, bytes,
                [&](const BlockPlace& place, int64_t run, const uint8_t* from) {
                  work_.memory.Write(/*slot=*/0, place.residuals, run * kBlockSize, from);
                });
  }

  // Bytes of `size` elements, and `padding` in the rest of the last block. Calls write_run(place,
  // number of blocks, their bytes).
  template <class F>
  void WriteBlocks(int64_t first, int64_t size, int64_t block_bytes, uint8_t padding,
                   const uint8_t* bytes, const F& write_run) const {
    const int64_t whole = size / kBlockSize, left = size % kBlockSize;
    const auto write = [&](int64_t begin, int64_t count, const uint8_t* from) {
      ForEachRun(work_.region, work_.info.first_block + begin, count,
                 [&](const BlockPlace& place, int64_t done, int64_t run) {
                   write_run(place, run, from + done * block_bytes);
                 });
    };
    write(first, whole, bytes);
    if (left == 0) return;
    std::vector<uint8_t> last(block_bytes, padding);
    std::memcpy(last.data(), bytes + whole * block_bytes, left * block_bytes / kBlockSize);
    write(first + whole, 1, last.data());
  }

  void WriteWords(int64_t first, int64_t count, const std::vector<uint8_t*>& arrays) const {
    const size_t num_words = arrays.size();
    std::vector<uint32_t> words(count * num_words);  // those of a block are neighbours
    for (int64_t b = 0; b < count; ++b) {
      const bool is_padded = (first + b + 1) * kBlockSize > num_elements();
      for (size_t w = 0; w < num_words; ++w) {
        uint32_t& word = words[b * num_words + w];
        std::memcpy(&word, arrays[w] + b * 4, 4);
        if (!work_.transcoder.may_store_word(static_cast<int32_t>(w), word, is_padded)) {
          work_.RefuseValues();
        }
      }
    }
    ForEachRun(work_.region, work_.info.first_block + first, count,
               [&](const BlockPlace& place, int64_t done, int64_t run) {
                 work_.memory.Write(/*slot=*/0, place.words,
                                    run * static_cast<int64_t>(num_words) * 4,
                                    words.data() + done * num_words);
               });
  }

  int64_t num_elements() const { return work_.info.size; }

  const LeafWork& work_;
  const Piece& piece_;
  bool is_read_once_;
};

void CopyAll(const std::vector<LeafWork>& works, const std::vector<const Piece*>& pieces,
             const Memory& memory) {
  std::vector<Copying> leaves;
  std::vector<LoadItem> items;
  for (size_t i = 0; i < works.size(); ++i) leaves.emplace_back(works[i], *pieces[i]);
  for (const Copying& leaf : leaves) leaf.AddItems(items);
  LoadItems(items, memory);
}

}  // namespace

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
  CopyAll(stored, pieces, *arena.memory);
  for (const LeafWork& work : others) Reblock(work);
  arena.header.version = arena.header.versions[0] = arena.header.started = 1;
}

}  // namespace paged_optax
