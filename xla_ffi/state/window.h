// Blocks of one leaf on their way into an arena: in one form whatever the layout.
#pragma once

#include <cstdint>
#include <vector>

#include "layout/layout.h"
#include "memory/memory.h"
#include "step/transcode.h"

namespace paged_optax {

struct WindowShape {
  int32_t num_states;
  int32_t code_bytes;  // of an element
  int32_t num_words;   // of a block
  int32_t residual_bytes;
};

// Consecutive blocks.
class Window {
 public:
  explicit Window(const WindowShape& shape) : shape_(shape), codes_(shape.num_states) {}

  // So many blocks, of `size` elements; those that follow are padding. Codes of the last block and
  // residuals are those of zero.
  void Reset(int64_t num_blocks, int64_t size, const Transcoder& transcoder);

  const WindowShape& shape() const { return shape_; }
  int64_t num_blocks() const { return num_blocks_; }
  int64_t size() const { return size_; }
  uint8_t* codes(size_t state) { return codes_[state].data(); }
  const uint8_t* codes(size_t state) const { return codes_[state].data(); }
  uint32_t* words() { return words_.data(); }  // those of a block are neighbours
  const uint32_t* words() const { return words_.data(); }
  uint8_t* residuals() { return residuals_.data(); }
  const uint8_t* residuals() const { return residuals_.data(); }

 private:
  WindowShape shape_;
  int64_t num_blocks_ = 0, size_ = 0;
  std::vector<std::vector<uint8_t>> codes_;
  std::vector<uint32_t> words_;
  std::vector<uint8_t> residuals_;
};

// Writes a window into a slot, from block `first` of the region on.
void WriteWindow(const Window& window, const Region& region, int64_t first, Memory& memory,
                 int32_t slot);

}  // namespace paged_optax
