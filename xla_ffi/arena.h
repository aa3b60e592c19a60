// Owner of the moments: arenas, the versions of their contents, and the registry that finds the
// arena of a token. Used by module.cc.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

#include "layout.h"
#include "memory.h"
#include "token.h"

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

// Shapes and codecs of the leaves of one call, in tree order.
class Layout {
 public:
  struct LeafInfo {
    Codec codec;
    std::vector<int64_t> dims;
    int64_t size;
    int64_t first_block;
  };

  // Returns the number of the leaf's first block among the blocks of its codec.
  int64_t Append(Codec codec, const int64_t* dims, int64_t rank);
  // `paths` names the leaves; layouts that differ in it are different.
  void SetPaths(int64_t paths) { paths_ = paths; }
  uint64_t Fingerprint() const;
  std::vector<LeafInfo> Leaves() const;
  const ArenaExtent& extent() const { return extent_; }

 private:
  std::vector<int64_t> words_;  // per leaf: codec, rank, dims
  int64_t paths_ = 0;
  ArenaExtent extent_;
};

// Where a new arena may live.
struct PlacementPolicy {
  int64_t device_bytes;    // budget for resident moments on a device; negative: what is free
  int64_t headroom_bytes;  // device memory to leave free
};

// The moments of one state on one device.
struct Arena {
  DeviceId device;
  Header header;  // on the GPU only a copy: the device's own is in the DeviceTable
  Layout layout;
  int64_t tree;  // names the tree structure to the Python side
  Memory memory;
  std::mutex mutex;  // CPU: held while a step or a read uses the contents
};

// What one call brings along to find or make its arena.
struct Request {
  DeviceId device;
  int64_t run;  // names the execution of the program; the same on all devices that take part
  int64_t tree;
  PlacementPolicy policy;
  const Layout* layout;
  uint64_t fingerprint;
};

struct ArenaReport {
  DeviceId device;
  int32_t version;
  int64_t tree;
  Placement placement;
  int64_t nbytes;
  std::vector<Layout::LeafInfo> leaves;
};

#if PAGED_OPTAX_CUDA
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
};
#endif

// Process-wide, never destroyed: nothing calls CUDA while the process exits. Thread-safe; where two
// locks are held, the contents' (an arena's or a table's) was taken before the registry's own.
class Registry {
 public:
  static Registry& Get();

  // Handle of a new state. Devices that take part in one execution get the same handle.
  // Within one, calls are told apart by `seed` and, for the same seed (a loop), by their order.
  int32_t IssueHandle(DeviceId device, int64_t run, int32_t seed);

  // The arena for a token on the CPU, made at its first use. Throws what Explain says.
  std::shared_ptr<Arena> Open(const Request& request, Token token);

  // Why a token was refused, for the user.
  std::string Explain(Verdict verdict, DeviceId device, Token token, int32_t version,
                      uint64_t call_layout);

#if PAGED_OPTAX_CUDA
  // Whether a token may belong to a state that has no arena here yet and so has to be looked at on
  // the host: some state was made and never used, or another device was first in this same
  // execution. `table.mutex` must be held.
  bool MayBeFirstUse(int64_t run, const DeviceTable& table);
  DeviceTable& Table(int ordinal);
  // Makes the arena of a fresh token if this is its first use. `table.mutex` must be held.
  void BindOnFirstUse(const Request& request, Token token, DeviceTable& table, void* stream);
  // Throws for a refused step that has not been reported yet.
  void ThrowIfRejected(DeviceTable& table);
#endif
  // Same for every device.
  void ThrowIfRejected();

  // Remembers the layout, for Explain.
  void RememberLayout(const Layout& layout, uint64_t fingerprint);

  // All arenas of a state; waits for the device. Throws if there is none although the state was
  // used.
  std::vector<ArenaReport> Describe(Token token);

  // Bytes [offset, offset + nbytes) of an arena, checked against the token.
  void Read(DeviceId device, Token token, int64_t offset, int64_t nbytes, void* destination);

  // Frees every arena of a state, waiting for steps under way. Returns the bytes freed.
  int64_t Release(int32_t handle);

  int64_t NumArenas();
  int64_t NumUnused();

 private:
  Registry();
  bool IsFirstUse(int32_t handle, int64_t run);  // mutex_ held
  void NoteBound(int32_t handle, int64_t run);   // mutex_ held
  std::shared_ptr<Arena> Find(DeviceId device, int32_t handle);
  std::vector<std::shared_ptr<Arena>> FindAll(int32_t handle);
  std::unique_lock<std::mutex> LockContents(Arena& arena);
  int32_t CurrentVersion(const Arena& arena);

  struct Issue {
    int64_t run;
    int32_t seed;
    int32_t handle;
    std::set<DeviceId> devices;
  };
  struct Bound {
    int32_t handle;
    int64_t run;
  };

  std::mutex mutex_;
  const int32_t first_handle_;
  int32_t next_handle_;
  std::deque<Issue> issues_;  // recent
  std::set<int32_t> unused_;  // issued, no arena on any device yet
  std::deque<Bound> bound_;   // recent
  std::atomic<int64_t> num_unused_{0};
  std::map<std::pair<DeviceId, int32_t>, std::shared_ptr<Arena>> cpu_arenas_;
  std::unordered_map<uint64_t, Layout> layouts_;
#if PAGED_OPTAX_CUDA
  std::vector<DeviceTable*> Tables();
  std::map<int, std::unique_ptr<DeviceTable>> tables_;
#endif
};

}  // namespace paged_optax
