// Memory of a state on the CPU: the pages of a file. See memory.h.
#include <fcntl.h>
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <string>

#include "base/faults.h"
#include "base/notice.h"
#include "base/status.h"
#include "memory/file_system.h"
#include "memory/host_memory.h"
#include "memory/preflight.h"
#include "memory/promises.h"

namespace paged_optax {
namespace {

// A file without a name: it goes when the process ends, however it ends.
int OpenNameless(const std::string& directory) {
#if defined(O_TMPFILE)
  const int fd = PAGED_CALL(open, -1, directory.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
  if (fd >= 0 || (errno != EOPNOTSUPP && errno != EISDIR && errno != EINVAL)) return fd;
#endif
  // Not every file system has such files. Here a kill between the two calls would leave a name.
  std::string path = directory + "/paged_optax-XXXXXX";
  const int named = PAGED_CALL(mkostemp, -1, path.data(), O_CLOEXEC);
  if (named >= 0) PAGED_CALL(unlink, -1, path.c_str());
  return named;
}

// Files that are open, for a forked process to close: their room on the disk is taken for as long
// as anybody has them open. A lock could be held at the fork; so there is none.
std::atomic<int> open_files[1024];  // a file's number and 1; 0: free

void CloseFilesOfParent() {
  for (std::atomic<int>& file : open_files) {
    const int fd = file.exchange(0) - 1;
    if (fd >= 0) close(fd);
  }
}

void NoteOpened(int fd) {
  [[maybe_unused]] static const int is_watching =
      pthread_atfork(nullptr, nullptr, &CloseFilesOfParent);
  for (std::atomic<int>& file : open_files) {
    int expected = 0;
    if (file.compare_exchange_strong(expected, fd + 1)) return;
  }
}

void NoteClosed(int fd) {
  for (std::atomic<int>& file : open_files) {
    int expected = fd + 1;
    if (file.compare_exchange_strong(expected, 0)) return;
  }
}

// The file, opened, examined and as long as it has to be.
class File {
 public:
  File(const std::string& directory, int64_t nbytes) : fd_(OpenNameless(directory)) {
    if (fd_ < 0) {
      throw StatusError(StatusCode::kInvalidArgument,
                        "no file can be made in Paging(directory='" + directory + "') (" +
                            std::strerror(errno) +
                            "). Name an existing directory that this process may write to.");
    }
    try {
      Reserve(directory, nbytes);
    } catch (...) {
      close(fd_);
      throw;
    }
    NoteOpened(fd_);
  }
  File(const File&) = delete;
  ~File() {
    NoteClosed(fd_);
    close(fd_);
  }

  int fd() const { return fd_; }

 private:
  // A full disk would otherwise show as a SIGBUS in the middle of a step.
  void Reserve(const std::string& directory, int64_t nbytes) {
    const FileSystem system = Examine(fd_);
    std::optional<HostPromise> promise;  // until the room is taken
    if (system.is_in_ram) promise.emplace(nbytes);
    if (!system.danger.empty()) {
      PostNotice({0, 0,
                  "moments in Paging(directory='" + directory + "') are at risk: " + system.danger +
                      ". Name a directory of a local ext4 or XFS file system."});
    }
    int error;
    do {
      error = PAGED_CALL(posix_fallocate, errno, fd_, 0, nbytes);
    } while (error == EINTR);
    if (error != 0) {
      RefuseMemory("the file system of '" + directory + "' has no " + FormatBytes(nbytes) +
                       " for the optimizer's moments",
                   error, "Free space, or name a directory of a larger file system.");
    }
  }

  int fd_;
};

class FileMemory final : public Memory {
 public:
  FileMemory(const Geometry& geometry, const std::string& directory)
      : Memory(geometry),
        directory_(directory),
        file_(directory, geometry.NumBytes()),
        data_(MapMemory(geometry.NumBytes(), MAP_SHARED, file_.fd())) {}

  ~FileMemory() override { munmap(data_, geometry().NumBytes()); }

  MemoryKind kind() const override { return MemoryKind::kFile; }

  uint8_t* Address(int32_t slot, int32_t segment) const override {
    return data_ + slot * geometry().slot_bytes + geometry().Offset(segment);
  }

  // The kernel writes pages out whenever it likes, and drops them even if that failed. It tells of
  // it once. Waiting for pages after the end of the file waits for none, and asks.
  void CheckContents() override {
#if defined(SYNC_FILE_RANGE_WAIT_BEFORE)
    if (lost_ == 0 && PAGED_CALL(sync_file_range, -1, file_.fd(), geometry().NumBytes(), 1,
                                 SYNC_FILE_RANGE_WAIT_BEFORE) != 0) {
      const bool is_of_disk = errno == EIO || errno == ENOSPC || errno == EDQUOT;
      if (is_of_disk) lost_ = errno;
    }
#endif
    if (lost_ != 0) throw StatusError(StatusCode::kFailedPrecondition, Trouble());
  }

  int64_t ResidentBytes() const override { return MappedBytes(data_, geometry().NumBytes()); }

  void PageOut(int64_t nbytes) override {
    const int64_t end = geometry().NumBytes(), page = sysconf(_SC_PAGESIZE);
    const int64_t begin = RoundUp(nbytes, page);
    if (nbytes >= end || begin >= end) return;
    // Clean pages can be dropped at once.
    const int64_t before = MappedBytes(data_ + begin, end - begin);
    if (PAGED_CALL(msync, -1, data_ + begin, end - begin, MS_SYNC) != 0) {
      Keep(begin, end, before, errno);
    }
    trouble_.clear();
#if defined(MADV_PAGEOUT)
    PAGED_CALL(madvise, -1, data_ + begin, end - begin, MADV_PAGEOUT);
    if (MappedBytes(data_ + begin, end - begin) == 0) return;
    // Pages that other CPUs touched last are still in those CPUs' lists, which this call empties.
    PAGED_CALL(posix_fadvise, errno, file_.fd(), begin, end - begin, POSIX_FADV_DONTNEED);
    PAGED_CALL(madvise, -1, data_ + begin, end - begin, MADV_PAGEOUT);
#endif
  }

  std::string Trouble() const override {
    if (lost_ == 0) return trouble_;
    return "paged_optax: the operating system could not write moments of this optimizer state to "
           "their file in '" +
           directory_ + "' (" + std::strerror(lost_) +
           "), and may have dropped them from RAM: they cannot be trusted any more. Make a new "
           "state with init(params), in another directory or on a sound disk; parameters are not "
           "affected.";
  }

  void PageIn() override { PAGED_CALL(madvise, -1, data_, geometry().NumBytes(), MADV_WILLNEED); }

 private:
  // After a write that failed. The kernel takes pages for clean that it could not write, and must
  // not drop them: each is made dirty again. If some went before that, contents may be lost.
  [[noreturn]] void Keep(int64_t begin, int64_t end, int64_t mapped_before, int error) {
    if (MappedBytes(data_ + begin, end - begin) < mapped_before) lost_ = error;
    CheckContents();
    const int64_t page = sysconf(_SC_PAGESIZE);
    for (int64_t i = begin; i < end; i += page) {
      volatile uint8_t* byte = data_ + i;
      *byte = *byte;
    }
    trouble_ = "moments could not be written to their file in '" + directory_ + "' (" +
               std::strerror(error) +
               "). They are still whole, in RAM, and the state can be used. Free space or look "
               "after the disk, and do it before RAM gets short.";
    throw StatusError(StatusCode::kResourceExhausted, trouble_);
  }

  void Copy(const void* source, int64_t nbytes, void* destination) const override {
    std::memcpy(destination, source, nbytes);
  }

  const std::string directory_;
  const File file_;
  uint8_t* const data_;
  int lost_ = 0;         // errno of the write that failed when nobody looked
  std::string trouble_;  // what the last write said that failed; empty once one worked
};

}  // namespace

std::unique_ptr<Memory> MakeFileMemory(const Geometry& geometry, const std::string& directory) {
  return std::make_unique<FileMemory>(geometry, directory);
}

}  // namespace paged_optax
