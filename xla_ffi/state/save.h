// Arrays on their way into a file: several threads read them, sum them and write them at once.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "base/disk_file.h"

namespace paged_optax {

// An array of bytes.
struct SavedArray {
  int64_t nbytes;
  // Copies bytes [begin, begin + nbytes). Any thread calls it, several at once.
  std::function<void(int64_t begin, int64_t nbytes, uint8_t* destination)> read;
  // Called with the checksum of the whole, to throw if it is not the right one. May be empty.
  std::function<void(uint32_t crc)> check = {};
};

// Writes arrays one after the other into an existing file, from its start on, and returns the
// CRC-32 of each. Does not sync. Throws std::system_error if the file cannot be written.
std::vector<uint32_t> SaveArrays(const std::string& path, const std::vector<SavedArray>& arrays);

// The same, piece by piece. Any thread may read and write pieces.
class Saver {
 public:
  Saver(const std::string& path, std::vector<SavedArray> arrays);

  int64_t num_pieces() const { return static_cast<int64_t>(parts_.size()); }
  // Fills a buffer with a piece; once each.
  void Read(int64_t piece, DiskBuffer& buffer);
  void Write(int64_t piece, DiskBuffer& buffer) const;
  // After all pieces were read: lets go of what the arrays are read from. Bytes whose checksum is
  // still to be compared stay.
  void EndReading();
  // After that, or after all pieces were read.
  std::vector<uint32_t> Sums() const;

 private:
  // A part of an array that lies in one piece.
  struct Part {
    size_t array;
    int64_t nbytes;
    uint32_t crc;
  };

  int64_t SizeOf(int64_t piece) const;

  std::vector<SavedArray> arrays_;
  std::vector<int64_t> ends_;  // of the arrays, in the file
  int64_t nbytes_ = 0;
  std::vector<std::vector<Part>> parts_;  // of each piece, in order
  std::optional<OutputFile> file_;
};

}  // namespace paged_optax
