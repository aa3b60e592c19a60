// The moments of one state on one device: what belongs to them, how they come to be, and what can
// be said about them.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "base/stream.h"
#include "layout/token.h"
#include "memory/memory.h"
#include "memory/planner.h"
#include "state/device_id.h"
#include "state/handles.h"
#include "state/leaf_names.h"
#include "state/lock.h"
#include "state/signature.h"

namespace paged_optax {

class DeviceBuffer;
struct Source;

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
  Header header;  // on the GPU only a copy: CudaDevice has the device's own
  Signature signature;
  int64_t tree;        // names the tree structure to the Python side
  std::string shards;  // tells the Python side which parts of the leaves are on which device
  LeafNames names;
  PlacementPolicy policy;
  int32_t part;                         // which parts of the leaves the device has
  int64_t run;                          // the execution that it was made in
  std::vector<ArrayPlace> places = {};  // of the rule "array"
  std::unique_ptr<Memory> memory = nullptr;
  SegmentTable segments = {};  // on the GPU only a copy: the device has its own
  ContentsMutex mutex = {};    // CPU: guards the contents. A GPU has one for all its arenas
  Residency residency = {};    // GPU
  std::shared_ptr<DeviceBuffer> device_segments = nullptr;  // GPU: the device's own table
  std::shared_ptr<DeviceBuffer> device_places = nullptr;    // GPU: and its copy of `places`
  std::chrono::steady_clock::time_point made = std::chrono::steady_clock::now();
};

// An arena whose contents nobody changes for as long as this lives: no step starts, and none is
// under way.
struct LockedArena {
  std::shared_ptr<Arena> arena;
  Header header;      // the newest
  ContentsLock lock;  // the last member, because it is given up before the arena may go
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
  int32_t part;                 // which parts of the leaves the device has
  std::string_view names = {};  // paths of the leaves, as LeafNames takes them; empty if unknown
  bool restart = false;         // whether a state whose moments are not in this process starts over
  // Of a state that was restored, what its arenas are filled with.
  std::shared_ptr<const Source> source = nullptr;
};

struct ArenaReport {
  DeviceId device;
  int32_t handle;
  int32_t version;
  double age;  // seconds
  int64_t tree;
  std::string shards;
  LeafNames names;
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
  std::string trouble;  // as Memory::Trouble says
};

ArenaReport Report(const LockedArena& locked);

// An arena for a fresh token, without memory yet. What is in it does not matter: the first step
// reads nothing.
std::shared_ptr<Arena> MakeArena(const Request& request, Token token);

// Whether a call may make the arena of a token that has none: of a state that was never updated, in
// whatever process, or of one from elsewhere that may start over.
bool MayStart(const Handles& handles, const Request& request, Token token);

// Warns that a state starts over.
void NoteRestart(const Arena& arena);

// For the log: the arena has its memory, `resident` bytes of it in the device's own.
void NoteMade(const Arena& arena, int64_t resident);

// Gives a new arena memory of the host.
void PlaceOnHost(Arena& arena);

// The same on a GPU, in two calls by CudaDevice: fills in `residency`, for the planner to decide
// what its share of the GPU's memory is; then makes the memory, and the device's copy of where its
// segments are.
void PrepareResidency(Arena& arena);
void PlaceOnDevice(Arena& arena, const FirstShare& share, Stream stream);

inline constexpr int64_t kCpuGranularity = 512;  // of the slots of a CPU; a GPU's is kChunkBytes

// Bytes of one slot, which starts at a multiple of `granularity`.
int64_t SlotBytes(const Signature& signature, int64_t granularity);

}  // namespace paged_optax
