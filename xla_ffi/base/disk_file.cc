// See disk_file.h.
#include "base/disk_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <new>
#include <system_error>

#include "base/faults.h"

namespace paged_optax {
namespace {

[[noreturn]] void Throw(int error) { throw std::system_error(error, std::generic_category()); }

int Open(const std::string& path, int flags) {
  int fd;
  do {
    fd = PAGED_CALL(open, -1, path.c_str(), flags | O_CLOEXEC);
  } while (fd < 0 && errno == EINTR);
  return fd;
}

// Whether a file system refused a transfer past the page cache, and not the transfer itself.
bool IsRefusal(int error) { return error == EINVAL || error == EOPNOTSUPP || error == ENOTSUP; }

}  // namespace

uint8_t* DiskBuffer::Reserve(int64_t nbytes) {
  if (nbytes <= nbytes_) return bytes_.get();
  nbytes = (nbytes + kDiskPage - 1) / kDiskPage * kDiskPage;
  bytes_.reset();
  nbytes_ = 0;
  bytes_.reset(static_cast<uint8_t*>(std::aligned_alloc(kDiskPage, nbytes)));
  if (bytes_ == nullptr) throw std::bad_alloc();
  nbytes_ = nbytes;
  return bytes_.get();
}

DiskFile::DiskFile(const std::string& path, int flags) : flags_(flags), fd_(Open(path, flags)) {
  if (fd_ < 0) Throw(errno);
}

DiskFile::~DiskFile() {
  if (direct_fd_ >= 0) close(direct_fd_);
  close(fd_);
}

void DiskFile::GoDirect() {
#if defined(O_DIRECT)
  // The same file, even if another one has its name by now.
  direct_fd_ = Open("/proc/self/fd/" + std::to_string(fd_), (flags_ & O_ACCMODE) | O_DIRECT);
  is_direct_ = direct_fd_ >= 0;
#endif
}

OutputFile::OutputFile(const std::string& path, int64_t nbytes) : file_(path, O_WRONLY) {
  file_.GoDirect();
#if defined(__linux__)
  // Not posix_fallocate, which writes zeros where the file system cannot do it.
  while (nbytes > 0 && PAGED_CALL(fallocate, -1, file_.fd(), 0, 0, nbytes) != 0) {
    if (errno == EINTR) continue;
    if (errno == ENOSPC || errno == EDQUOT || errno == EFBIG) Throw(errno);
    break;  // then a full disk shows later
  }
#endif
}

void OutputFile::Write(int64_t offset, const uint8_t* bytes, int64_t nbytes) const {
  for (int64_t done = 0; done < nbytes;) {
    const int64_t left = nbytes - done;
    const int64_t size = left < kDiskPage ? left : left / kDiskPage * kDiskPage;
    const bool is_even = (offset + done) % kDiskPage == 0 && size % kDiskPage == 0;
    const int direct = is_even ? file_.direct_fd() : -1, fd = direct < 0 ? file_.fd() : direct;
    const ssize_t part = PAGED_FAILS("empty pwrite")
                             ? 0
                             : PAGED_CALL(pwrite, -1, fd, bytes + done, size, offset + done);
    if (part < 0 && errno == EINTR) continue;
    if (part < 0 && fd == direct && IsRefusal(errno)) {
      file_.StayBuffered();
      continue;
    }
    if (part <= 0) Throw(part == 0 ? EIO : errno);
#if defined(__linux__)
    if (fd != direct) sync_file_range(fd, offset + done, part, SYNC_FILE_RANGE_WRITE);
#endif
    done += part;
  }
}

InputFile::InputFile(const std::string& path, bool is_read_once)
    : file_(path, O_RDONLY | O_NONBLOCK) {  // a pipe must not wait
  struct stat status;
  is_file_ = PAGED_CALL(fstat, -1, file_.fd(), &status) == 0 && S_ISREG(status.st_mode);
  if (!is_file_) return;
  nbytes_ = status.st_size;
  if (is_read_once) file_.GoDirect();
}

int64_t InputFile::Read(int64_t offset, int64_t nbytes, uint8_t* destination,
                        DiskBuffer& scratch) const {
  if (nbytes < kDiskPage || file_.direct_fd() < 0) return ReadBuffered(offset, nbytes, destination);
  uint8_t* const pages = scratch.Reserve(nbytes + 2 * kDiskPage);
  const int64_t got = ReadPages(offset, nbytes, pages);
  std::memcpy(destination, pages + offset % kDiskPage, got);
  return got;
}

int64_t InputFile::ReadPages(int64_t offset, int64_t nbytes, uint8_t* pages) const {
  const int64_t got = nbytes < kDiskPage ? 0 : ReadDirect(offset, nbytes, pages);
  return got + ReadBuffered(offset + got, nbytes - got, pages + offset % kDiskPage + got);
}

int64_t InputFile::ReadBuffered(int64_t offset, int64_t nbytes, uint8_t* destination) const {
  int64_t done = 0;
  while (done < nbytes) {
    const ssize_t part =
        PAGED_CALL(pread, -1, file_.fd(), destination + done, nbytes - done, offset + done);
    if (part < 0 && errno == EINTR) continue;
    if (part < 0) Throw(errno);
    if (part == 0) break;
    done += part;
  }
  return done;
}

// Reads whole pages, with the bytes that are asked for among them. May stop before their end.
int64_t InputFile::ReadDirect(int64_t offset, int64_t nbytes, uint8_t* pages) const {
  const int fd = file_.direct_fd();
  if (fd < 0) return 0;
  const int64_t skip = offset % kDiskPage;
  const int64_t size = (skip + nbytes + kDiskPage - 1) / kDiskPage * kDiskPage;
  int64_t got = 0;
  while (got < size) {
    const ssize_t part =
        PAGED_FAILS("direct pread") ? -1 : pread(fd, pages + got, size - got, offset - skip + got);
    if (part < 0 && errno == EINTR) continue;
    if (part < 0 && !IsRefusal(errno)) Throw(errno);
    if (part < 0) {
      file_.StayBuffered();
      break;
    }
    got += part;
    if (part % kDiskPage != 0 || part == 0) break;  // the end of the file
  }
  return std::clamp<int64_t>(got - skip, 0, nbytes);
}

}  // namespace paged_optax
