// See fill.h.
#include "state/fill.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "base/threads.h"
#include "state/leaf_work.h"
#include "state/reblock.h"
#include "state/shards.h"

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

void Copy(const LeafWork& work, const Piece& piece) {
  std::vector<std::unique_ptr<DataReader>> codes, words;
  for (const Data& data : piece.codes) codes.push_back(std::make_unique<DataReader>(data));
  for (const Data& data : piece.words) words.push_back(std::make_unique<DataReader>(data));
  std::unique_ptr<DataReader> residuals;
  if (piece.residuals) residuals = std::make_unique<DataReader>(*piece.residuals);
  Window window(work.shape);
  std::vector<uint32_t> row(LeafWork::kWindowBlocks);
  for (int64_t w = 0; w < work.num_windows(); ++w) {
    work.FillWindow(w, window, [&](int64_t) {
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
    });
  }
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
  ForEachInParallel(static_cast<int64_t>(stored.size()),
                    [&](int64_t i) { Copy(stored[i], *pieces[i]); });
  for (const LeafWork& work : others) Reblock(work);
  arena.header.version = arena.header.versions[0] = arena.header.started = 1;
}

}  // namespace paged_optax
