// Memory that XLA's allocator does not own: what every kind of it can do. The kinds are in
// host_memory.cc (CPU), managed_memory.cc and pinned_memory.cc (GPU).
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>

#include "base/stream.h"
#include "layout/geometry.h"

namespace paged_optax {

enum class MemoryKind : int8_t { kAnonymous, kFile, kManaged, kPinned };

const char* Name(MemoryKind kind);

// Where a segment lies, seen from a GPU.
enum class Tier : int8_t { kDevice, kHost };

// Consecutive segments that move to a tier together.
struct Move {
  int32_t first;
  int32_t count;
  Tier to;
};

// Owner of the slots of one arena.
class Memory {
 public:
  explicit Memory(const Geometry& geometry) : geometry_(geometry) {}
  Memory(const Memory&) = delete;
  virtual ~Memory() = default;

  const Geometry& geometry() const { return geometry_; }
  virtual MemoryKind kind() const = 0;
  virtual uint8_t* Address(int32_t slot, int32_t segment) const = 0;
  // For kernels and for the CPU loop.
  SegmentTable Table(int32_t num_resident) const;
  // Copies out of a slot without moving a page. Waits for the copy, not for steps.
  void Read(int32_t slot, int64_t offset, int64_t nbytes, void* destination) const;
  // The same into a slot. No step may run.
  void Write(int32_t slot, int64_t offset, int64_t nbytes, const void* source);

  // A move, in four calls by one thread, `stream` being the same. Prepare may take long; of a kind
  // that changes no address it does everything. Enqueue comes while no step is running, or with the
  // stream waiting for it, and returns at once. Only Publish changes what Address says. Finish
  // comes when the stream is done. A move that fails before it was published ends with Abandon.
  virtual bool ChangesAddresses() const { return false; }
  virtual void Prepare(const Move&, Stream) {}
  virtual void Enqueue(const Move&, Stream) {}
  virtual void Publish(const Move&) noexcept {}
  virtual void Finish(const Move&, Stream) {}
  virtual void Abandon(const Move&, Stream) noexcept {}

  // Makes Read and Write of these bytes of the host faster until the result goes, if that can be.
  virtual std::shared_ptr<const void> Pin(std::shared_ptr<void> /*bytes*/,
                                          int64_t /*nbytes*/) const {
    return nullptr;
  }

  // To be set once the first step is done: what is on the host has been taken from it. Null where
  // nobody has to say so.
  virtual std::shared_ptr<std::atomic<bool>> is_taken() const { return nullptr; }

  // What is wrong with the memory, as far as it is known; empty if nothing is. Contents are whole
  // unless CheckContents throws.
  virtual std::string Trouble() const { return ""; }
  // Throws if contents may have been lost without a step's doing. Every use asks first.
  virtual void CheckContents() {}

  // Memory in a file only: how many bytes are in RAM; writes out everything after the first
  // `nbytes` and drops it from RAM, or throws and keeps it; reads everything ahead.
  virtual int64_t ResidentBytes() const { return geometry_.NumBytes(); }
  virtual void PageOut(int64_t /*nbytes*/) {}
  virtual void PageIn() {}

 private:
  // Calls body(address, done, part) for the parts of a range that lie in one segment each.
  template <class F>
  void ForEachPart(int32_t slot, int64_t offset, int64_t nbytes, const F& body) const;

  // Between a slot and other memory of the host, in either direction.
  virtual void Copy(const void* source, int64_t nbytes, void* destination) const = 0;

  Geometry geometry_;
};

// Anonymous pages, which the operating system makes as they are touched, or, with a directory, the
// pages of a file in it that has no name and so goes with the process. Throws before anything is
// allocated if the machine has no room.
std::unique_ptr<Memory> MakeHostMemory(int64_t slot_bytes, int32_t num_slots,
                                       const std::string& directory);

// CUDA managed memory: the leading segments prefer the GPU and are sent there on `stream`, the
// others stay in host memory, which the GPU reads and writes in place.
std::unique_ptr<Memory> MakeManagedMemory(const Geometry& geometry, int device,
                                          int32_t num_resident, Stream stream);

// The same without managed memory: pinned host memory that the GPU maps, and plain device memory
// for the leading segments.
std::unique_ptr<Memory> MakePinnedMemory(const Geometry& geometry, int device, int32_t num_resident,
                                         Stream stream);

}  // namespace paged_optax
