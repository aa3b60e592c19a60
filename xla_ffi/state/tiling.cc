// See tiling.h.
#include "state/tiling.h"

namespace paged_optax {
namespace {

// The number of the cell that a coordinate lies in.
int64_t CellOf(const std::vector<int64_t>& edges, int64_t coordinate) {
  if (edges.size() == 2) return 0;
  return std::upper_bound(edges.begin(), edges.end(), coordinate) - edges.begin() - 1;
}

bool IsWithin(const Box& box, const std::vector<int64_t>& shape) {
  if (box.start.size() != shape.size() || box.shape.size() != shape.size()) return false;
  for (size_t d = 0; d < shape.size(); ++d) {
    if (box.start[d] < 0 || box.shape[d] < 0 || box.shape[d] > shape[d]) return false;
    if (box.start[d] > shape[d] - box.shape[d]) return false;
  }
  return true;
}

bool IsEmpty(const std::vector<int64_t>& shape) {
  return std::find(shape.begin(), shape.end(), 0) != shape.end();
}

}  // namespace

std::optional<Tiling> Tiling::Make(const std::vector<int64_t>& shape,
                                   const std::vector<const Box*>& boxes) {
  Tiling tiling;
  tiling.shape_ = shape;
  for (const Box* box : boxes) {
    if (!IsWithin(*box, shape) || IsEmpty(box->shape) != IsEmpty(shape)) return std::nullopt;
  }
  if (IsEmpty(shape)) return tiling;
  size_t num_cells = 1;
  for (size_t d = 0; d < shape.size(); ++d) {
    std::vector<int64_t> edges;
    for (const Box* box : boxes) edges.push_back(box->start[d]);
    edges.push_back(shape[d]);
    std::sort(edges.begin(), edges.end());
    edges.erase(std::unique(edges.begin(), edges.end()), edges.end());
    num_cells *= edges.size() - 1;
    if (edges.front() != 0 || num_cells > boxes.size()) return std::nullopt;
    tiling.edges_.push_back(std::move(edges));
  }
  // As many boxes as cells, each of them one cell, and no two the same.
  if (num_cells != boxes.size()) return std::nullopt;
  tiling.pieces_.assign(num_cells, -1);
  for (size_t i = 0; i < boxes.size(); ++i) {
    size_t cell = 0;
    for (size_t d = 0; d < shape.size(); ++d) {
      const std::vector<int64_t>& edges = tiling.edges_[d];
      const int64_t c = CellOf(edges, boxes[i]->start[d]);
      if (boxes[i]->start[d] + boxes[i]->shape[d] != edges[c + 1]) return std::nullopt;
      cell = cell * (edges.size() - 1) + c;
    }
    if (tiling.pieces_[cell] >= 0) return std::nullopt;
    tiling.pieces_[cell] = static_cast<int32_t>(i);
  }
  return tiling;
}

Tiling::Walk::Walk(const Tiling& tiling, const Box& target) : pieces_(tiling.pieces_) {
  const size_t rank = tiling.shape_.size();
  for (size_t d = 0; d < rank; ++d) size_ *= target.shape[d];
  if (size_ == 0) return;
  dims_.push_back({0, 1, {0, 1}});
  for (size_t d = 0; d < rank; ++d) {
    const int64_t whole = tiling.shape_[d];
    if (tiling.edges_[d].size() == 2 && target.shape[d] == whole) {
      Dim& last = dims_.back();
      last.start *= whole;
      last.size *= whole;
      for (int64_t& edge : last.edges) edge *= whole;
    } else {
      dims_.push_back({target.start[d], target.shape[d], tiling.edges_[d]});
    }
  }
}

Run Tiling::Walk::RunAt(int64_t element, int64_t end) const {
  int64_t cell = 0, cell_stride = 1, source = 0, source_stride = 1, left = element, length = 0;
  for (size_t d = dims_.size(); d-- > 0;) {
    const Dim& dim = dims_[d];
    const int64_t place = left % dim.size, coordinate = dim.start + place;
    left /= dim.size;
    const int64_t c = CellOf(dim.edges, coordinate);
    if (d + 1 == dims_.size()) {
      length = std::min({end - element, dim.size - place, dim.edges[c + 1] - coordinate});
    }
    cell += c * cell_stride;
    cell_stride *= static_cast<int64_t>(dim.edges.size()) - 1;
    source += (coordinate - dim.edges[c]) * source_stride;
    source_stride *= dim.edges[c + 1] - dim.edges[c];
  }
  return {pieces_[cell], source, element, length};
}

}  // namespace paged_optax
