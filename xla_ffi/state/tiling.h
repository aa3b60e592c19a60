// Which element of a leaf lies where, if the leaf is cut into boxes along its dimensions.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "state/source.h"

namespace paged_optax {

// Elements that follow each other in a target and in one piece.
struct Run {
  int32_t piece;
  int64_t source;  // the first one's place in the piece
  int64_t target;  // and in the target
  int64_t length;
};

// A leaf that is cut into pieces, each dimension at places of its own.
class Tiling {
 public:
  // Nothing if the boxes do not fill the leaf exactly, or not as a grid.
  static std::optional<Tiling> Make(const std::vector<int64_t>& shape,
                                    const std::vector<const Box*>& boxes);

  class Walk;

 private:
  std::vector<int64_t> shape_;
  std::vector<std::vector<int64_t>>
      edges_;                    // of each dimension: where its cells begin, and the end
  std::vector<int32_t> pieces_;  // of the cells, in row-major order
};

// The way through a target box, in row-major order.
class Tiling::Walk {
 public:
  // `target` lies within the leaf.
  Walk(const Tiling& tiling, const Box& target);

  int64_t size() const { return size_; }

  // Calls body(run) for elements [begin, end) of the target, in order. Runs are as long as they can
  // be.
  template <class F>
  void ForEachRun(int64_t begin, int64_t end, const F& body) const {
    Run run{0, 0, begin, 0};
    for (int64_t element = begin; element < end;) {
      const Run next = RunAt(element, end);
      if (run.length > 0 && next.piece == run.piece && next.source == run.source + run.length) {
        run.length += next.length;
      } else {
        if (run.length > 0) body(run);
        run = next;
      }
      element += next.length;
    }
    if (run.length > 0) body(run);
  }

 private:
  struct Dim {
    int64_t start, size;         // of the target
    std::vector<int64_t> edges;  // as in Tiling
  };

  Run RunAt(int64_t element, int64_t end) const;

  const std::vector<int32_t>& pieces_;
  std::vector<Dim> dims_;  // neighbours that nothing cuts count as one
  int64_t size_ = 1;
};

}  // namespace paged_optax
