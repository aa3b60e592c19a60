// Arrays on their way into a file: several threads read them, sum them and write them at once.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

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

}  // namespace paged_optax
