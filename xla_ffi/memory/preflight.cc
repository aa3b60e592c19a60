// See preflight.h.
#include "memory/preflight.h"

#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <limits>
#include <sstream>

#include "base/status.h"

namespace paged_optax {
namespace {

constexpr int64_t kUnlimited = std::numeric_limits<int64_t>::max();

// First number in a file, or kUnlimited where there is no such file or it says "max".
int64_t ReadNumber(const std::string& path) {
  std::ifstream file(path);
  int64_t value;
  return file >> value ? value : kUnlimited;
}

int64_t SystemAvailableBytes() {
  std::ifstream file("/proc/meminfo");
  std::string key;
  int64_t kilobytes;
  std::string rest;
  while (file >> key >> kilobytes && std::getline(file, rest)) {
    if (key == "MemAvailable:") return kilobytes * 1024;
  }
  return static_cast<int64_t>(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGESIZE);
}

// Bytes of page cache in a control group that the kernel gives up when asked for memory.
int64_t ReclaimableBytes(const std::string& directory) {
  std::ifstream file(directory + "/memory.stat");
  std::string key;
  int64_t value;
  while (file >> key >> value) {
    if (key == "inactive_file") return value;
  }
  return 0;
}

// Room below the limit of the control group `directory` and of every group above it.
int64_t GroupAvailableBytes(std::string directory, const std::string& root, const char* limit_file,
                            const char* usage_file) {
  int64_t available = kUnlimited;
  for (;;) {
    const int64_t limit = ReadNumber(directory + "/" + limit_file);
    const int64_t usage = ReadNumber(directory + "/" + usage_file);
    if (limit != kUnlimited && usage != kUnlimited) {
      available =
          std::min(available, std::max<int64_t>(0, limit - usage + ReclaimableBytes(directory)));
    }
    if (directory.size() <= root.size()) return available;
    directory.erase(directory.find_last_of('/'));
  }
}

int64_t ControlGroupAvailableBytes() {
  // Lines of /proc/self/cgroup: "0::/path" (version 2) or "4:memory:/path" (version 1).
  std::ifstream file("/proc/self/cgroup");
  std::string line;
  int64_t available = kUnlimited;
  while (std::getline(file, line)) {
    const size_t first = line.find(':');
    const size_t second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    std::string path = line.substr(second + 1);
    if (path == "/") path.clear();
    if (controllers.empty()) {
      const std::string root = "/sys/fs/cgroup";
      available = std::min(available,
                           GroupAvailableBytes(root + path, root, "memory.max", "memory.current"));
    } else if (controllers.find("memory") != std::string::npos) {
      const std::string root = "/sys/fs/cgroup/memory";
      available = std::min(
          available,
          GroupAvailableBytes(root + path, root, "memory.limit_in_bytes", "memory.usage_in_bytes"));
    }
  }
  return available;
}

}  // namespace

std::string FormatBytes(int64_t nbytes) {
  const char* units[] = {"B", "KiB", "MiB", "GiB", "TiB", "PiB"};
  double value = static_cast<double>(nbytes);
  int unit = 0;
  for (; value >= 1024 && unit < 5; ++unit) value /= 1024;
  char text[32];
  std::snprintf(text, sizeof(text), unit == 0 ? "%.0f %s" : "%.2f %s", value, units[unit]);
  return text;
}

int64_t AvailableHostBytes() {
  return std::min(SystemAvailableBytes(), ControlGroupAvailableBytes());
}

void CheckHostMemory(int64_t nbytes, int64_t available, int64_t promised) {
  if (nbytes <= available - promised) return;
  std::ostringstream message;
  message << "the optimizer's moments need " << FormatBytes(nbytes) << " of host memory but "
          << FormatBytes(available) << " are available (system and control group limits counted)";
  if (promised > 0) {
    message << ", of which " << FormatBytes(promised)
            << " are promised to the moments of other states and devices of this process";
  }
  message << ". Free host memory, release() optimizer states that are no longer used, or shard the "
             "parameters over more devices. Nothing was allocated.";
  throw StatusError(StatusCode::kResourceExhausted, message.str());
}

void CheckAddressSpace(int64_t nbytes) {
  rlimit limit{};
  if (getrlimit(RLIMIT_AS, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY) return;
  const int64_t pages = ReadNumber("/proc/self/statm");  // the first number: size of the process
  const int64_t used = pages == kUnlimited ? 0 : pages * sysconf(_SC_PAGESIZE);
  const int64_t left = static_cast<int64_t>(limit.rlim_cur) - used;
  if (nbytes <= left) return;
  throw StatusError(StatusCode::kResourceExhausted,
                    "the optimizer's moments need " + FormatBytes(nbytes) +
                        " of address space but the limit of this process (ulimit -v) leaves " +
                        FormatBytes(std::max<int64_t>(0, left)) +
                        ". Raise it. Nothing was allocated.");
}

}  // namespace paged_optax
