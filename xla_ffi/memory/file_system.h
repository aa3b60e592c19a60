// What kind of file system a file is in, as far as it matters for moments that lie in the file.
#pragma once

#include <string>

namespace paged_optax {

struct FileSystem {
  bool is_in_ram;      // files take RAM, and paging them out frees none
  std::string danger;  // why moments are not safe there; empty if nothing is known against it
};

// Of an open file that is still empty. Where a file system can be told to write in place, it is.
FileSystem Examine(int fd);

// By the number that statfs has for the type. Knows nothing of a file.
FileSystem Classify(long type);

}  // namespace paged_optax
