// Memory of a state on the CPU: anonymous pages. See memory.h.
#include "memory/host_memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <vector>

#include "base/faults.h"
#include "base/status.h"
#include "memory/preflight.h"
#include "memory/promises.h"

namespace paged_optax {

void RefuseMemory(const std::string& what, int error, const std::string& remedy) {
  throw StatusError(StatusCode::kResourceExhausted, what + " (" + std::strerror(error) + "). " +
                                                        remedy + " Nothing was allocated.");
}

uint8_t* MapMemory(int64_t nbytes, int flags, int fd) {
  void* data = PAGED_CALL(mmap, MAP_FAILED, nullptr, nbytes, PROT_READ | PROT_WRITE, flags, fd, 0);
  if (data == MAP_FAILED) {
    if (errno == ENODEV) {
      RefuseMemory("the file system of Paging(directory=...) cannot map files into memory", errno,
                   "Name a directory of an ordinary local file system.");
    }
    RefuseMemory("the operating system refused " + FormatBytes(nbytes) +
                     " for the optimizer's moments, mmap",
                 errno, "Raise the address space limit (ulimit -v) or use a smaller state.");
  }
#if defined(MADV_DONTFORK)
  PAGED_CALL(madvise, -1, data, nbytes, MADV_DONTFORK);
#endif
  return static_cast<uint8_t*>(data);
}

int64_t MappedBytes(const uint8_t* data, int64_t nbytes) {
  static const int64_t page = sysconf(_SC_PAGESIZE);
  constexpr int64_t kPages = 1 << 16;
  std::vector<unsigned char> flags(std::min(kPages, (nbytes + page - 1) / page));
  int64_t mapped = 0;
  for (int64_t done = 0; done < nbytes; done += kPages * page) {
    const int64_t part = std::min(nbytes - done, kPages * page);
    void* begin = const_cast<uint8_t*>(data + done);
    if (PAGED_CALL(mincore, -1, begin, part, flags.data()) != 0) return nbytes;
    const int64_t pages = (part + page - 1) / page;
    mapped += page * std::count_if(flags.begin(), flags.begin() + pages,
                                   [](unsigned char each) { return (each & 1) != 0; });
  }
  return std::min(nbytes, mapped);
}

namespace {

class AnonymousMemory final : public Memory {
 public:
  explicit AnonymousMemory(const Geometry& geometry)
      : Memory(geometry),
        promise_(geometry.NumBytes()),
        data_(MapMemory(geometry.NumBytes(), MAP_PRIVATE | MAP_ANONYMOUS, -1)) {
    promise_.Keep([data = data_, nbytes = geometry.NumBytes()] {
      return nbytes - MappedBytes(data, nbytes);
    });
  }

  ~AnonymousMemory() override {
    promise_.End();
    munmap(data_, geometry().NumBytes());
  }

  MemoryKind kind() const override { return MemoryKind::kAnonymous; }

  uint8_t* Address(int32_t slot, int32_t segment) const override {
    return data_ + slot * geometry().slot_bytes + geometry().Offset(segment);
  }

 private:
  void Copy(const void* source, int64_t nbytes, void* destination) const override {
    std::memcpy(destination, source, nbytes);
  }

  HostPromise promise_;
  uint8_t* const data_;
};

}  // namespace

std::unique_ptr<Memory> MakeHostMemory(int64_t slot_bytes, int32_t num_slots,
                                       const std::string& directory) {
  // Nothing moves here: one segment.
  const Geometry geometry{slot_bytes, num_slots, /*log2_chunks=*/40};
  CheckAddressSpace(geometry.NumBytes());
  if (!directory.empty()) return MakeFileMemory(geometry, directory);
  return std::make_unique<AnonymousMemory>(geometry);
}

}  // namespace paged_optax
