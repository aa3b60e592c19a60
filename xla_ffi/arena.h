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
#include <string_view>
#include <unordered_map>
#include <vector>

#include "memory.h"
#include "signature.h"
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

// Where moments may live.
struct PlacementPolicy {
  int64_t device_bytes;    // budget for resident moments on a device; negative: what is free
  int64_t headroom_bytes;  // device memory to leave free
  bool pinned;             // pinned memory instead of managed memory
  std::string directory;   // CPU: of the file to keep moments in; empty for none
};

// How much of an arena is in the memory of its GPU. Segments are counted from the first one.
struct Residency {
  int32_t segments = 0;     // that are there
  int32_t target = 0;       // that should be
  bool moving = false;      // the pager is at work on it, and when that is done
  int32_t moving_to = 0;    // so many will be there
  int32_t held = 0;         // that the driver holds device memory for; see Pager::HeldBytes
  int64_t limit = -1;       // most bytes that may be there, set by hand; negative for none
  bool failed = false;      // a move to the GPU failed: only prefetch tries again
  int64_t moved_bytes = 0;  // since the arena was made
  double moving_seconds = 0.0;
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
  ArenaExtent extent;
  int64_t resident_blocks;  // leading ones, in the order of the arena
  int32_t num_slots;
  int64_t num_devices;
  std::vector<Signature::LeafInfo> leaves;
};

#if PAGED_OPTAX_CUDA
struct DeviceTable;
#endif

// Process-wide, never destroyed: nothing calls CUDA while the process exits. Thread-safe; where two
// locks are held, the contents' (an arena's or a table's) was taken before the registry's own.
class Registry {
 public:
  static Registry& Get();

  // Handle of a new state. Devices that take part in one execution get the same handle.
  // Within one, calls are told apart by `seed` and, for the same seed (a loop), by their order.
  // `shared`: other processes take part as well, and all of them count from the shared base.
  int32_t IssueHandle(DeviceId device, int64_t run, int32_t seed, bool shared);
  // A random number that the processes of this job have in common; later calls change nothing.
  void SetSharedBase(int32_t random);

  // The arena for a token on the CPU, made at its first use. Throws what Explain says.
  std::shared_ptr<Arena> Open(const Request& request, Token token);

  // Why a token was refused, for the user.
  std::string Explain(Verdict verdict, DeviceId device, Token token, int32_t version,
                      uint64_t call_fingerprint);

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

  // For Explain.
  void Remember(const Signature& signature, uint64_t fingerprint);

  // All arenas of a state; waits for the device. Throws if there is none although the state was
  // used.
  std::vector<ArenaReport> Describe(Token token);

  // Bytes [offset, offset + nbytes) of the slot that holds the token's contents.
  void Read(DeviceId device, Token token, int64_t offset, int64_t nbytes, void* destination);

  // Limits the moments of a state to so many bytes of each device's memory (negative: no limit) and
  // moves what has to move. Returns the bytes that were moved.
  int64_t Limit(Token token, int64_t device_bytes);

  // Frees every arena of a state, waiting for steps under way. Returns the bytes freed.
  int64_t Release(int32_t handle);
  int64_t ReleaseAll();

  // Ends the threads that move moments, for the end of the process.
  void StopPagers();

  int64_t NumArenas();
  int64_t NumUnused();

 private:
  Registry();
  bool IsFirstUse(int32_t handle, int64_t run);  // mutex_ held
  void NoteBound(int32_t handle, int64_t run);   // mutex_ held
  std::shared_ptr<Arena> Find(DeviceId device, int32_t handle);
  std::vector<std::shared_ptr<Arena>> FindAll(int32_t handle);
  std::unique_lock<std::mutex> LockContents(Arena& arena);
  Header CurrentHeader(const Arena& arena);  // contents locked
  bool WasIssuedHere(int32_t handle) const;  // mutex_ held

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

  struct HandleRange {
    int32_t first;
    int32_t next;
    bool Contains(int32_t handle) const { return first <= handle && handle < next; }
  };

  std::mutex mutex_;
  HandleRange own_;
  HandleRange shared_{0, 0};  // {0, 0}: not set
  std::deque<Issue> issues_;  // recent
  std::set<int32_t> unused_;  // issued, no arena on any device yet
  std::deque<Bound> bound_;   // recent
  std::atomic<int64_t> num_unused_{0};
  std::map<std::pair<int32_t, DeviceId>, std::shared_ptr<Arena>> cpu_arenas_;
  std::unordered_map<uint64_t, Signature> signatures_;
#if PAGED_OPTAX_CUDA
  std::vector<DeviceTable*> Tables();
  std::map<int, std::unique_ptr<DeviceTable>> tables_;
#endif
};

}  // namespace paged_optax
