// The moments of one state on one device: what belongs to them, and how they come to be. Used by
// registry.cc, which owns them, and by those it hands them to.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "layout/token.h"
#include "memory/memory.h"
#include "memory/planner.h"
#include "state/signature.h"

namespace paged_optax {

enum class Platform : int8_t { kCpu, kCuda };

struct DeviceId {
  Platform platform;
  int ordinal;
  bool operator<(const DeviceId& other) const {
    return platform != other.platform ? platform < other.platform : ordinal < other.ordinal;
  }
  bool operator==(const DeviceId& other) const {
    return platform == other.platform && ordinal == other.ordinal;
  }
};

// Where moments may live.
struct PlacementPolicy {
  int64_t device_bytes;    // budget for resident moments on a device; negative: what is free
  int64_t headroom_bytes;  // device memory to leave free
  bool pinned;             // pinned memory instead of managed memory
  std::string directory;   // CPU: of the file to keep moments in; empty for none
};

// The moments of one state on one device.
struct Arena {
  DeviceId device;
  Header header;  // on the GPU only a copy: the device's own is in the DeviceTable
  Signature signature;
  int64_t tree;        // names the tree structure to the Python side
  std::string shards;  // tells the Python side which parts of the leaves are on which device
  PlacementPolicy policy;
  std::unique_ptr<Memory> memory = nullptr;
  SegmentTable segments = {};  // on the GPU only a copy, of which the device has its own
  Residency residency = {};    // GPU
  std::mutex mutex = {};       // CPU: held while a step or a read uses the contents
#if PAGED_OPTAX_CUDA
  std::unique_ptr<DeviceBuffer> device_segments = nullptr;
#endif
};

// What one call brings along to find or make its arena.
struct Request {
  DeviceId device;
  int64_t run;  // names the execution of the program; the same on all devices that take part
  int64_t tree;
  std::string_view shards;
  PlacementPolicy policy;
  const Signature* signature;
  uint64_t fingerprint;
  int32_t part;  // which parts of the leaves the device has
};

struct ArenaReport {
  DeviceId device;
  int32_t version;
  int64_t tree;
  std::string shards;
  MemoryKind kind;
  int64_t nbytes;          // of all slots
  int64_t resident_bytes;  // of those, in the device's memory; of a file, in RAM
  int64_t budget;          // as in PlacementPolicy
  Residency residency;
  Extent extent;
  std::array<int64_t, kFormats.size()> resident_blocks;  // leading ones of each region
  int8_t rule;
  int32_t num_slots;
  int64_t num_devices;
  std::vector<Signature::LeafInfo> leaves;
};

#if PAGED_OPTAX_CUDA
struct DeviceTable;
#endif

std::string Name(DeviceId device);

// An arena for a fresh token, and then its memory. What is in it does not matter: the first step
// reads nothing.
std::shared_ptr<Arena> MakeArena(const Request& request, Token token);
void PlaceOnHost(Arena& arena);
#if PAGED_OPTAX_CUDA
void PlaceOnDevice(Arena& arena, DeviceTable& table, void* stream);  // `table.mutex` held
#endif

// Its contents must be locked.
ArenaReport Report(const Arena& arena, int32_t version);

}  // namespace paged_optax
