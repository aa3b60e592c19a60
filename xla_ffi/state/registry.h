// Who owns the arenas: finds that of a token, makes it at the token's first use, and says why a
// token was refused. Used by handlers.cc and module.cc.
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
#include <utility>
#include <vector>

#include "state/arena.h"

namespace paged_optax {

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
