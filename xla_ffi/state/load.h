// Arrays on their way out of files: several threads read them, sum them and hand them on at once.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "memory/memory.h"
#include "state/source.h"

namespace paged_optax {

// Bytes [begin, begin + nbytes) of an array.
struct Span {
  const Data* data;
  int64_t begin;
  int64_t nbytes;
};

// Parts of arrays that are needed together: at most kDiskPiece bytes of one to four arrays.
struct LoadItem {
  std::vector<Span> spans;
  bool is_read_once;  // as for InputFile
  // Called with the bytes of each span, wherever they lie. It may change them, and the bytes from
  // the multiple of 4 before the first of them on. Any thread calls it, for several items at once.
  std::function<void(const std::vector<uint8_t*>& bytes)> use;
};

// Reads all items, best in the order in which they lie in their files, and uses each. Neighbours in
// a file are read at once. The spans of an array follow each other from its start to its end; in
// the end its checksum is compared. `target` is the memory that the bytes go to. Throws what is
// wrong with an array, and what `use` throws.
void LoadItems(const std::vector<LoadItem>& items, const Memory& target);

}  // namespace paged_optax
