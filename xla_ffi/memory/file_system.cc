// See file_system.h. The numbers are those of linux/magic.h, or of the file systems' own sources.
#include "memory/file_system.h"

#if defined(__linux__)
#include <linux/fs.h>
#include <sys/ioctl.h>
#include <sys/vfs.h>
#endif

#include "base/faults.h"

namespace paged_optax {
namespace {

constexpr unsigned kTmpfs = 0x01021994, kRamfs = 0x858458f6;
constexpr unsigned kBtrfs = 0x9123683e, kZfs = 0x2fc12fc1, kBcachefs = 0xca451a4e;
constexpr unsigned kNfs = 0x6969, kCifs = 0xff534d42, kSmb2 = 0xfe534d42, kCeph = 0x00c36400;
constexpr unsigned kLustre = 0x0bd00bd0, kAfs = 0x5346414f, kPlan9 = 0x01021997;
constexpr unsigned kFuse = 0x65735546;

struct Known {
  unsigned type;
  const char* name;
};
constexpr Known kCopyOnWrite[] = {{kBtrfs, "btrfs"}, {kZfs, "ZFS"}, {kBcachefs, "bcachefs"}};
constexpr Known kRemote[] = {{kNfs, "NFS"},       {kCifs, "CIFS"}, {kSmb2, "SMB"}, {kCeph, "Ceph"},
                             {kLustre, "Lustre"}, {kAfs, "AFS"},   {kPlan9, "9P"}, {kFuse, "FUSE"}};

template <size_t N>
const char* NameIn(const Known (&list)[N], unsigned type) {
  for (const Known& known : list) {
    if (known.type == type) return known.name;
  }
  return nullptr;
}

#if defined(__linux__)
// btrfs writes a file in place, into the room that was reserved for it, if told so while the file
// is empty.
bool WritesInPlace(int fd) {
  int flags = 0;
  if (PAGED_CALL(ioctl, -1, fd, FS_IOC_GETFLAGS, &flags) != 0) return false;
  flags |= FS_NOCOW_FL;
  return PAGED_CALL(ioctl, -1, fd, FS_IOC_SETFLAGS, &flags) == 0;
}
#endif

}  // namespace

FileSystem Classify(long type) {
  const auto number = static_cast<unsigned>(type);
  if (number == kTmpfs || number == kRamfs) return {true, ""};
  if (const char* name = NameIn(kCopyOnWrite, number)) {
    return {false, std::string("it is ") + name +
                       ", which writes every page to a new place (copy on write), so that no room "
                       "can be reserved: if the disk fills up, a step ends the process (SIGBUS)"};
  }
  if (const char* name = NameIn(kRemote, number)) {
    return {false, std::string("it is ") + name +
                       ", whose files may be on another machine: if that fails, moments are lost, "
                       "and a step ends the process (SIGBUS)"};
  }
  return {false, ""};
}

FileSystem Examine(int fd) {
#if defined(__linux__)
  struct statfs system;
  if (PAGED_CALL(fstatfs, -1, fd, &system) != 0) return {false, ""};
  FileSystem result = Classify(static_cast<long>(system.f_type));
  if (static_cast<unsigned>(system.f_type) == kBtrfs && WritesInPlace(fd)) result.danger.clear();
  return result;
#else
  (void)fd;
  return {false, ""};
#endif
}

}  // namespace paged_optax
