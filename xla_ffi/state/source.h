// Moments from outside of the process, such as a checkpoint's, until the first step of their state
// takes them over.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/disk_file.h"

namespace paged_optax {

// A part of a leaf, in elements of the whole leaf.
struct Box {
  std::vector<int64_t> start;
  std::vector<int64_t> shape;
};

// The bytes of one array: in memory, or in a file that is read when they are needed.
struct Data {
  int64_t nbytes = 0;
  const uint8_t* bytes = nullptr;  // null: in the file
  std::shared_ptr<const void> owner = nullptr;
  std::string path = {};
  std::string shown_path = {};  // in UTF-8
  int64_t offset = 0;
  std::optional<uint32_t> crc = {};
};

// What is stored of a box: elements in row-major order, 256 a block, without padding.
struct Piece {
  Box box;
  std::vector<Data> codes;  // one a state
  std::vector<Data> words;  // one a state, if the format has any
  std::optional<Data> residuals = {};
};

struct SourceLeaf {
  std::string name;            // empty: unknown
  std::vector<int64_t> shape;  // of the whole leaf
  int8_t format;
  std::vector<Piece> pieces;
};

struct Source {
  int8_t rule;
  bool has_residuals;
  bool convert;           // whether formats may differ from those of the step
  int64_t local_devices;  // the most that will take the moments over in this process; 0: not known
  std::vector<SourceLeaf> leaves;

  // "['w']", or "leaf 3".
  std::string NameOf(size_t leaf) const;
};

// Throws if counts and sizes do not fit together, or boxes do not tile their leaf. Reads no data.
void CheckSource(const Source& source);

// The product of non-negative numbers; nothing if it is more elements than a state may have.
std::optional<int64_t> ProductOf(const std::vector<int64_t>& shape);

// Throws if the array has a checksum, and it is another one. Opens no file.
void CheckSum(const Data& data, uint32_t crc);

// Reads an array, in pieces and from any thread.
class DataReader {
 public:
  // `is_read_once`: as for InputFile. Throws what is wrong with the file.
  DataReader(const Data& data, bool is_read_once);
  // Of a file that is open already. Null: the array is in memory, or empty.
  DataReader(const Data& data, std::shared_ptr<const InputFile> file);

  // Null as above.
  const std::shared_ptr<const InputFile>& file() const { return file_; }
  // Bytes [begin, begin + nbytes). `scratch` is for this call.
  void Read(int64_t begin, int64_t nbytes, uint8_t* destination, DiskBuffer& scratch) const;
  // The same out of the file, as InputFile does it. May go on into other arrays of the file.
  void ReadPages(int64_t begin, int64_t nbytes, uint8_t* pages) const;

 private:
  template <class F>
  void Check(int64_t nbytes, const F& read) const;

  const Data& data_;
  std::shared_ptr<const InputFile> file_;
};

}  // namespace paged_optax
