// Small arrays next to the moments: owners of plain device memory and of pinned host memory that
// the GPU maps, for which the device must be current when one is made; and bytes that are pinned.
#pragma once

#include <cstdint>
#include <memory>

namespace paged_optax {

// Device memory, zeroed.
class DeviceBuffer {
 public:
  explicit DeviceBuffer(int64_t nbytes);
  DeviceBuffer(const DeviceBuffer&) = delete;
  ~DeviceBuffer();
  void* data() const { return data_; }

 private:
  void* data_ = nullptr;
};

// Host memory with an address on either side, zeroed.
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

// Memory of somebody else, which this keeps. A GPU copies it without the driver's copying it first.
// If the driver refuses, nothing is different.
class PinnedBytes {
 public:
  PinnedBytes(std::shared_ptr<void> bytes, int64_t nbytes, int device);
  PinnedBytes(const PinnedBytes&) = delete;
  ~PinnedBytes();

 private:
  std::shared_ptr<void> bytes_;  // null: refused
};

}  // namespace paged_optax
