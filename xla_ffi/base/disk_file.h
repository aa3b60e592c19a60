// Files that are written or read once, from end to end: past the page cache where the file system
// can, because copying through it takes more time of the processor than the disk takes.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>

namespace paged_optax {

inline constexpr int64_t kDiskPage = 4096;  // what places, sizes and addresses are multiples of
inline constexpr int64_t kDiskPiece = int64_t{8}
                                      << 20;  // bytes that a disk is as fast with as can be
static_assert(kDiskPiece % kDiskPage == 0);

// Memory that disks can read and write by themselves.
class DiskBuffer {
 public:
  // At least so many bytes. Those that were there are gone.
  uint8_t* Reserve(int64_t nbytes);

 private:
  struct Free {
    void operator()(uint8_t* bytes) const { std::free(bytes); }
  };
  std::unique_ptr<uint8_t, Free> bytes_;
  int64_t nbytes_ = 0;
};

// An open file, and the same one opened to go past the page cache.
class DiskFile {
 public:
  // Throws std::system_error. `flags` as for open.
  DiskFile(const std::string& path, int flags);
  DiskFile(const DiskFile&) = delete;
  ~DiskFile();

  int fd() const { return fd_; }
  // -1 where that cannot be.
  int direct_fd() const { return is_direct_ ? direct_fd_ : -1; }
  // Opens it.
  void GoDirect();
  // The file system refused a transfer past the page cache: no other one is to try.
  void StayBuffered() const { is_direct_ = false; }

 private:
  const int flags_;
  int fd_ = -1, direct_fd_ = -1;
  mutable std::atomic<bool> is_direct_{false};
};

// Any thread may call `Write` and `Read`. They throw std::system_error.

class OutputFile {
 public:
  // An existing file, which is to have at least so many bytes. Takes the room for them at once
  // where the file system can promise it.
  OutputFile(const std::string& path, int64_t nbytes);

  // From a DiskBuffer. The disk begins at once, so that a sync at the end has little to wait for.
  void Write(int64_t offset, const uint8_t* bytes, int64_t nbytes) const;

 private:
  DiskFile file_;
};

class InputFile {
 public:
  // `is_read_once`: whether nobody else will read the same bytes soon.
  InputFile(const std::string& path, bool is_read_once);

  bool is_file() const { return is_file_; }
  int64_t nbytes() const { return nbytes_; }
  // Returns how many bytes there were. `scratch` is for this call.
  int64_t Read(int64_t offset, int64_t nbytes, uint8_t* destination, DiskBuffer& scratch) const;
  // The same, to offset % kDiskPage in `pages`, which begin and end at multiples of kDiskPage.
  // Nothing is copied on the way.
  int64_t ReadPages(int64_t offset, int64_t nbytes, uint8_t* pages) const;

 private:
  int64_t ReadDirect(int64_t offset, int64_t nbytes, uint8_t* pages) const;
  int64_t ReadBuffered(int64_t offset, int64_t nbytes, uint8_t* destination) const;

  DiskFile file_;
  bool is_file_ = false;
  int64_t nbytes_ = 0;
};

}  // namespace paged_optax
