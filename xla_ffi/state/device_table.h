// What a GPU knows of its arenas, in its own memory, where kernels find them. Used by registry.cc
// and the CUDA handler.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "layout/token.h"
#include "memory/memory.h"
#include "state/arena.h"
#include "state/pager.h"

namespace paged_optax {

// The headers of all arenas of one GPU, in device memory, and the mailbox for refused steps.
// Members are used with `mutex` held.
struct DeviceTable {
  explicit DeviceTable(int ordinal);

  void Append(std::shared_ptr<Arena> arena);
  void Remove(int32_t handle);  // the device must be idle
  Header ReadHeader(int32_t handle) const;
  std::shared_ptr<Arena> Find(int32_t handle) const;

  Header* headers() const { return static_cast<Header*>(buffers.back()->data()); }
  Rejection* device_rejection() const { return static_cast<Rejection*>(mailbox.device()); }
  // Returns the report of a refused step and clears it.
  bool TakeRejection(Rejection* rejection);

  const int ordinal;
  std::mutex mutex;
  std::vector<std::shared_ptr<Arena>> arenas;  // in the order of the headers
  // Outgrown tables stay until the process ends: a queued kernel may still read one.
  std::vector<std::unique_ptr<DeviceBuffer>> buffers;
  int64_t capacity = 0;
  MappedBuffer mailbox;
  Pager pager{*this};
};

}  // namespace paged_optax
