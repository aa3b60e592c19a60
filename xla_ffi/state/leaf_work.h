// What it takes to fill one leaf of an arena with restored moments, window by window.
#pragma once

#include <algorithm>
#include <cstdint>

#include "layout/layout.h"
#include "memory/memory.h"
#include "state/signature.h"
#include "state/source.h"
#include "state/window.h"
#include "step/transcode.h"

namespace paged_optax {

struct LeafWork {
  static constexpr int64_t kWindowBlocks = 8192;  // 2 MiB of 8-bit codes: one piece for a disk

  const Source& source;
  size_t leaf;
  const Signature::LeafInfo& info;  // of the arena's leaf
  Box box;                          // that the arena has of it
  WindowShape shape;
  Transcoder transcoder;
  const Region& region;
  Memory& memory;

  const SourceLeaf& from() const { return source.leaves[leaf]; }
  int64_t num_blocks() const { return NumBlocks(info.size); }
  int64_t num_windows() const { return (num_blocks() + kWindowBlocks - 1) / kWindowBlocks; }

  // Calls body(number of its first block) to fill a window, and writes it into the arena.
  template <class F>
  void FillWindow(int64_t index, Window& window, const F& body) const {
    const int64_t first = index * kWindowBlocks;
    const int64_t count = std::min(kWindowBlocks, num_blocks() - first);
    window.Reset(count, std::min(count * kBlockSize, info.size - first * kBlockSize), transcoder);
    body(first);
    CheckValues(window);
    WriteWindow(window, region, info.first_block + first, memory, /*slot=*/0);
  }

  // Throws if a step would not store what a window holds.
  void CheckValues(Window& window) const;
  [[noreturn]] void RefuseValues() const;
};

}  // namespace paged_optax
