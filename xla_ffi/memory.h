// Memory that XLA's allocator does not own. The only caller of the CUDA allocation, advice and
// prefetch functions, with a host twin for the CPU; used by arena.cc.
#pragma once

#include <cstdint>
#include <string>

namespace paged_optax {

// Where the pages of an allocation live. On the CPU there is one kind of memory, which counts as
// the device's own.
enum class Placement { kDevice, kHost };

// Owner of one zero-initialised-on-first-touch range of moments. Move-only; frees on destruction.
class Memory {
 public:
  // Anonymous mapping, populated by the operating system as it is touched.
  static Memory Anonymous(int64_t nbytes);

  // CUDA managed memory. kDevice: preferred location is the GPU and the pages are there on return
  // of the stream; kHost: pages stay in host memory and the GPU reads and writes them in place.
  static Memory Managed(int64_t nbytes, int device, Placement placement, void* stream);

  Memory() = default;
  Memory(Memory&& other) noexcept { *this = static_cast<Memory&&>(other); }
  Memory& operator=(Memory&& other) noexcept;
  ~Memory();

  uint8_t* data() const { return data_; }
  int64_t nbytes() const { return nbytes_; }
  Placement placement() const { return placement_; }

  // Copies out without moving a page. Waits for the copy, not for the device.
  void Read(int64_t offset, int64_t nbytes, void* destination) const;

 private:
  enum class Kind { kNone, kAnonymous, kManaged };
  Kind kind_ = Kind::kNone;
  uint8_t* data_ = nullptr;
  int64_t nbytes_ = 0;
  int device_ = -1;
  Placement placement_ = Placement::kDevice;
};

// Bytes of host memory that can still be had: the smaller of what the system reports available and
// what is left below the limits of the control groups this process is in.
int64_t AvailableHostBytes();

// Throws with the numbers and the remedy when `nbytes` more of host memory are not to be had.
void CheckHostMemory(int64_t nbytes);

// "1.5 GiB"
std::string FormatBytes(int64_t nbytes);

#if PAGED_OPTAX_CUDA
// Bytes of device memory that neither XLA's pool nor anyone else holds.
int64_t FreeDeviceBytes(int device);

// Throws if managed memory on this device cannot be read and written by CPU and GPU together.
void CheckManagedMemory(int device);

// Small arrays beside the moments; RAII owner of `count` bytes of plain device or pinned, mapped
// host memory.
class DeviceBuffer {
 public:
  explicit DeviceBuffer(int64_t nbytes);
  DeviceBuffer(const DeviceBuffer&) = delete;
  ~DeviceBuffer();
  void* data() const { return data_; }

 private:
  void* data_ = nullptr;
};

class MappedBuffer {
 public:
  explicit MappedBuffer(int64_t nbytes);
  MappedBuffer(const MappedBuffer&) = delete;
  ~MappedBuffer();
  void* host() const { return host_; }
  void* device() const { return device_; }

 private:
  void* host_ = nullptr;
  void* device_ = nullptr;
};
#endif

}  // namespace paged_optax
