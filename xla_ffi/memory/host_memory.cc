// Memory of a state on the CPU: anonymous pages, or those of a file. See memory.h.
#include <fcntl.h>
#include <sys/mman.h>
#if defined(__linux__)
#include <sys/vfs.h>
#endif
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "base/status.h"
#include "memory/memory.h"
#include "memory/preflight.h"

namespace paged_optax {
namespace {

[[noreturn]] void Refuse(const std::string& what, int error, const std::string& remedy) {
  throw StatusError(StatusCode::kResourceExhausted, what + " (" + std::strerror(error) + "). " +
                                                        remedy + " Nothing was allocated.");
}

class Descriptor {
 public:
  explicit Descriptor(int fd) : fd_(fd) {}
  Descriptor(const Descriptor&) = delete;
  ~Descriptor() {
    if (fd_ >= 0) close(fd_);
  }
  int get() const { return fd_; }

 private:
  int fd_;
};

// A file without a name: it goes when the process ends, however it ends.
int OpenNameless(const std::string& directory) {
#if defined(O_TMPFILE)
  const int fd = open(directory.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
  if (fd >= 0 || (errno != EOPNOTSUPP && errno != EISDIR && errno != EINVAL)) return fd;
#endif
  // Not every file system has such files. Here a kill between the two calls would leave a name.
  std::string path = directory + "/paged_optax-XXXXXX";
  const int named = mkstemp(path.data());
  if (named >= 0) unlink(path.c_str());
  return named;
}

bool IsInRam(int fd) {
#if defined(__linux__)
  constexpr long kTmpfs = 0x01021994;  // TMPFS_MAGIC of linux/magic.h
  struct statfs system;
  return fstatfs(fd, &system) == 0 && static_cast<long>(system.f_type) == kTmpfs;
#else
  (void)fd;
  return false;
#endif
}

class HostMemory final : public Memory {
 public:
  HostMemory(const Geometry& geometry, const std::string& directory)
      : Memory(geometry), kind_(directory.empty() ? MemoryKind::kAnonymous : MemoryKind::kFile) {
    const int64_t nbytes = geometry.NumBytes();
    CheckAddressSpace(nbytes);
    if (directory.empty()) {
      CheckHostMemory(nbytes);
      data_ = Map(nbytes, MAP_PRIVATE | MAP_ANONYMOUS, -1);
      return;
    }
    const Descriptor file(OpenNameless(directory));
    if (file.get() < 0) {
      throw StatusError(StatusCode::kInvalidArgument,
                        "no file can be made in Paging(directory='" + directory + "') (" +
                            std::strerror(errno) +
                            "). Name an existing directory that this process may write to.");
    }
    // Reserved now: a full disk would otherwise show as a SIGBUS in the middle of a step.
    if (IsInRam(file.get())) CheckHostMemory(nbytes);
    int error;
    do {
      error = posix_fallocate(file.get(), 0, nbytes);
    } while (error == EINTR);
    if (error != 0) {
      Refuse("the file system of '" + directory + "' has no " + FormatBytes(nbytes) +
                 " for the optimizer's moments",
             error, "Free space, or name a directory of a larger file system.");
    }
    data_ = Map(nbytes, MAP_SHARED, file.get());
    // A forked process would share the pages, and keep the file's space after a release.
#if defined(MADV_DONTFORK)
    madvise(data_, nbytes, MADV_DONTFORK);
#endif
  }

  ~HostMemory() override { munmap(data_, geometry().NumBytes()); }

  MemoryKind kind() const override { return kind_; }

  uint8_t* Address(int32_t slot, int32_t segment) const override {
    return data_ + slot * geometry().slot_bytes + geometry().Offset(segment);
  }

  int64_t ResidentBytes() const override {
    const int64_t nbytes = geometry().NumBytes(), page = sysconf(_SC_PAGESIZE);
    if (kind_ == MemoryKind::kAnonymous) return nbytes;
    std::vector<unsigned char> pages((nbytes + page - 1) / page);
    if (mincore(data_, nbytes, pages.data()) != 0) return nbytes;
    const auto is_resident = [](unsigned char flags) { return (flags & 1) != 0; };
    return std::min<int64_t>(nbytes, page * std::count_if(pages.begin(), pages.end(), is_resident));
  }

  void PageOut(int64_t nbytes) override {
    if (kind_ == MemoryKind::kAnonymous) return;
    const int64_t end = geometry().NumBytes();
    if (nbytes >= end) return;
    const int64_t begin = RoundUp(nbytes, sysconf(_SC_PAGESIZE));
    if (begin >= end) return;
    msync(data_ + begin, end - begin, MS_SYNC);  // clean pages can be dropped at once
#if defined(MADV_PAGEOUT)
    madvise(data_ + begin, end - begin, MADV_PAGEOUT);
#endif
  }

  void PageIn() override {
    if (kind_ == MemoryKind::kFile) madvise(data_, geometry().NumBytes(), MADV_WILLNEED);
  }

 private:
  static uint8_t* Map(int64_t nbytes, int flags, int fd) {
    void* data = mmap(nullptr, nbytes, PROT_READ | PROT_WRITE, flags, fd, 0);
    if (data == MAP_FAILED) {
      Refuse("the operating system refused " + FormatBytes(nbytes) +
                 " for the optimizer's moments, mmap",
             errno, "Raise the address space limit (ulimit -v) or use a smaller state.");
    }
    return static_cast<uint8_t*>(data);
  }

  void Copy(const void* source, int64_t nbytes, void* destination) const override {
    std::memcpy(destination, source, nbytes);
  }

  MemoryKind kind_;
  uint8_t* data_ = nullptr;
};

}  // namespace

std::unique_ptr<Memory> MakeHostMemory(int64_t slot_bytes, int32_t num_slots,
                                       const std::string& directory) {
  // Nothing moves here: one segment.
  return std::make_unique<HostMemory>(Geometry{slot_bytes, num_slots, /*log2_chunks=*/40},
                                      directory);
}

}  // namespace paged_optax
