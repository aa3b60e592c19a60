// See memory.h. Used by arena.cc and, for the reports, by module.cc.
#include "memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <limits>
#include <sstream>
#include <utility>

#include "status.h"

#if PAGED_OPTAX_CUDA
#include "cuda_check.h"
#endif

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

void CheckHostMemory(int64_t nbytes) {
  const int64_t available = AvailableHostBytes();
  if (nbytes <= available) return;
  std::ostringstream message;
  message
      << "the optimizer's moments need " << FormatBytes(nbytes) << " of host memory but "
      << FormatBytes(available)
      << " are available (system and control group limits counted). Free host memory, release() "
         "optimizer states that are no longer used, or shard the parameters over more devices. "
         "Nothing was allocated.";
  throw StatusError(StatusCode::kResourceExhausted, message.str());
}

Memory Memory::Anonymous(int64_t nbytes) {
  CheckHostMemory(nbytes);
  void* data = mmap(nullptr, nbytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) {
    throw StatusError(StatusCode::kResourceExhausted,
                      "the operating system refused " + FormatBytes(nbytes) +
                          " for the optimizer's moments (mmap: " + std::strerror(errno) +
                          "). Raise the address space limit (ulimit -v) or use a smaller state. "
                          "Nothing was allocated.");
  }
  Memory memory;
  memory.kind_ = Kind::kAnonymous;
  memory.data_ = static_cast<uint8_t*>(data);
  memory.nbytes_ = nbytes;
  return memory;
}

Memory& Memory::operator=(Memory&& other) noexcept {
  std::swap(kind_, other.kind_);
  std::swap(data_, other.data_);
  std::swap(nbytes_, other.nbytes_);
  std::swap(device_, other.device_);
  std::swap(placement_, other.placement_);
  return *this;
}

Memory::~Memory() {
  if (kind_ == Kind::kAnonymous) munmap(data_, nbytes_);
#if PAGED_OPTAX_CUDA
  if (kind_ == Kind::kManaged) (void)cudaFree(data_);
#endif
}

void Memory::Read(int64_t offset, int64_t nbytes, void* destination) const {
#if PAGED_OPTAX_CUDA
  if (kind_ == Kind::kManaged) {
    // A copy by the driver leaves resident pages where they are; a plain read by the CPU would
    // fault them over to the host one by one.
    ScopedDevice device(device_);
    CUDA_CHECK(cudaMemcpy(destination, data_ + offset, nbytes, cudaMemcpyDefault));
    return;
  }
#endif
  std::memcpy(destination, data_ + offset, nbytes);
}

#if PAGED_OPTAX_CUDA

int64_t FreeDeviceBytes(int device) {
  ScopedDevice scope(device);
  size_t free = 0, total = 0;
  CUDA_CHECK(cudaMemGetInfo(&free, &total));
  return static_cast<int64_t>(free);
}

void CheckManagedMemory(int device) {
  int concurrent = 0;
  CUDA_CHECK(cudaDeviceGetAttribute(&concurrent, cudaDevAttrConcurrentManagedAccess, device));
  if (concurrent) return;
  throw StatusError(
      StatusCode::kFailedPrecondition,
      "GPU " + std::to_string(device) +
          " has no concurrent managed memory access (Windows, WSL and some virtual GPUs do not), "
          "which paged optimizers need. Run on Linux with a full GPU, or on CPU "
          "(JAX_PLATFORMS=cpu).");
}

namespace {

#if CUDART_VERSION >= 13000
cudaMemLocation Location(Placement placement, int device) {
  cudaMemLocation location{};
  location.type =
      placement == Placement::kDevice ? cudaMemLocationTypeDevice : cudaMemLocationTypeHost;
  location.id = placement == Placement::kDevice ? device : 0;
  return location;
}
#else
int Location(Placement placement, int device) {
  return placement == Placement::kDevice ? device : cudaCpuDeviceId;
}
#endif

void PrefetchToDevice(void* data, int64_t nbytes, int device, cudaStream_t stream) {
#if CUDART_VERSION >= 13000
  CUDA_CHECK(cudaMemPrefetchAsync(data, nbytes, Location(Placement::kDevice, device), /*flags=*/0,
                                  stream));
#else
  CUDA_CHECK(cudaMemPrefetchAsync(data, nbytes, device, stream));
#endif
}

}  // namespace

Memory Memory::Managed(int64_t nbytes, int device, Placement placement, void* stream) {
  CheckManagedMemory(device);
  // The driver may evict every managed page, so host memory must be there for all of them.
  CheckHostMemory(nbytes);
  ScopedDevice scope(device);
  Memory memory;
  CUDA_CHECK(
      cudaMallocManaged(reinterpret_cast<void**>(&memory.data_), nbytes, cudaMemAttachGlobal));
  memory.kind_ = Kind::kManaged;
  memory.nbytes_ = nbytes;
  memory.device_ = device;
  memory.placement_ = placement;
  CUDA_CHECK(cudaMemAdvise(memory.data_, nbytes, cudaMemAdviseSetPreferredLocation,
                           Location(placement, device)));
  if (placement == Placement::kDevice) {
    PrefetchToDevice(memory.data_, nbytes, device, static_cast<cudaStream_t>(stream));
  } else {
    // Mapped for the GPU wherever it lies: the kernel's accesses cross the link and never fault.
    CUDA_CHECK(cudaMemAdvise(memory.data_, nbytes, cudaMemAdviseSetAccessedBy,
                             Location(Placement::kDevice, device)));
  }
  return memory;
}

DeviceBuffer::DeviceBuffer(int64_t nbytes) {
  CUDA_CHECK(cudaMalloc(&data_, nbytes));
  const cudaError_t error = cudaMemset(data_, 0, nbytes);
  if (error != cudaSuccess) {
    (void)cudaFree(data_);
    ThrowCudaError(error, "cudaMemset");
  }
}

DeviceBuffer::~DeviceBuffer() { (void)cudaFree(data_); }

MappedBuffer::MappedBuffer(int64_t nbytes) {
  CUDA_CHECK(cudaHostAlloc(&host_, nbytes, cudaHostAllocMapped | cudaHostAllocPortable));
  std::memset(host_, 0, nbytes);
  const cudaError_t error = cudaHostGetDevicePointer(&device_, host_, 0);
  if (error != cudaSuccess) {
    (void)cudaFreeHost(host_);
    ThrowCudaError(error, "cudaHostGetDevicePointer");
  }
}

MappedBuffer::~MappedBuffer() { (void)cudaFreeHost(host_); }

#endif  // PAGED_OPTAX_CUDA

}  // namespace paged_optax
