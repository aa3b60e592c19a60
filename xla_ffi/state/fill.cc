// See fill.h.
#include "state/fill.h"

#include <algorithm>
#include <array>
#include <optional>
#include <utility>
#include <vector>

#include "base/crc32.h"
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

// A leaf that is stored as the arena wants it. Several threads copy windows of it.
class Copying {
 public:
  Copying(const LeafWork& work, const Piece& piece) : work_(work) {
    for (const Data& data : piece.codes) arrays_.push_back(&data);
    for (const Data& data : piece.words) arrays_.push_back(&data);
    if (piece.residuals) arrays_.push_back(&*piece.residuals);
    sums_.resize(work.num_windows() * arrays_.size());
    // Other devices read the same box if there are more of them than boxes.
    is_read_once_ = static_cast<int64_t>(work.from().pieces.size()) >= work.source.local_devices;
  }

  int64_t num_windows() const { return work_.num_windows(); }

  // Each thread has memory of its own for this.
  struct Local {
    DiskBuffer scratch;
    std::vector<uint32_t> words = {};
    std::array<std::optional<Window>, kFormats.size()> windows = {};
  };

  void CopyWindow(int64_t index, Local& local) {
    std::optional<Window>& kept = local.windows[work_.info.format];
    if (!kept) kept.emplace(work_.shape);
    Window& window = *kept;
    work_.FillWindow(index, window, [&](int64_t first) {
      const size_t num_states = work_.shape.num_states, num_words = work_.shape.num_words;
      for (size_t a = 0; a < arrays_.size(); ++a) {
        if (a < num_states) {
          const int64_t item = work_.shape.code_bytes;
          Read(index, a, first * kBlockSize * item, window.size() * item, window.codes(a), local);
        } else if (a < num_states + num_words) {
          local.words.resize(window.num_blocks());
          Read(index, a, first * 4, window.num_blocks() * 4,
               reinterpret_cast<uint8_t*>(local.words.data()), local);
          for (int64_t b = 0; b < window.num_blocks(); ++b) {
            window.words()[b * num_words + (a - num_states)] = local.words[b];
          }
        } else {
          Read(index, a, first * kBlockSize, window.size(), window.residuals(), local);
        }
      }
    });
  }

  // After all windows: throws if an array is not what was saved.
  void Check() const {
    for (size_t a = 0; a < arrays_.size(); ++a) {
      uint32_t crc = 0;
      for (int64_t w = 0; w < num_windows(); ++w) {
        const Sum& sum = sums_[w * arrays_.size() + a];
        crc = JoinCrc32(crc, sum.crc, sum.nbytes);
      }
      CheckSum(*arrays_[a], crc);
    }
  }

 private:
  struct Sum {
    uint32_t crc;
    int64_t nbytes;
  };

  void Read(int64_t index, size_t a, int64_t begin, int64_t nbytes, uint8_t* destination,
            Local& local) {
    const Data& data = *arrays_[a];
    DataReader(data, is_read_once_).Read(begin, nbytes, destination, local.scratch);
    const uint32_t crc = data.crc ? Crc32(0, destination, nbytes) : 0;
    sums_[index * arrays_.size() + a] = {crc, nbytes};
  }

  const LeafWork& work_;
  std::vector<const Data*> arrays_;
  bool is_read_once_;
  std::vector<Sum> sums_;  // of each array, for each window
};

void CopyAll(const std::vector<LeafWork>& works, const std::vector<const Piece*>& pieces) {
  std::vector<Copying> leaves;
  std::vector<std::pair<size_t, int64_t>> windows;  // of all leaves
  for (size_t i = 0; i < works.size(); ++i) {
    leaves.emplace_back(works[i], *pieces[i]);
    for (int64_t w = 0; w < leaves[i].num_windows(); ++w) windows.emplace_back(i, w);
  }
  ForEachInParallel(
      static_cast<int64_t>(windows.size()), std::max(NumThreads(), NumDiskThreads()),
      [] { return Copying::Local(); },
      [&](int64_t i, Copying::Local& local) {
        leaves[windows[i].first].CopyWindow(windows[i].second, local);
      });
  for (const Copying& leaf : leaves) leaf.Check();
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
  CopyAll(stored, pieces);
  for (const LeafWork& work : others) Reblock(work);
  arena.header.version = arena.header.versions[0] = arena.header.started = 1;
}

}  // namespace paged_optax
