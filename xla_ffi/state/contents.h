// What is stored of whole leaves, in one form whatever the layout: each leaf's blocks one after the
// other, the padding of the last one included.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "state/arena.h"

namespace paged_optax {

// One array of a leaf: a code an element, or a float32 a block.
struct LeafPart {
  enum class Type : int8_t { kUint8, kUint16, kFloat32 };
  // That of items of so many bytes.
  static Type Of(int64_t nbytes) {
    return nbytes == 4 ? Type::kFloat32 : nbytes == 2 ? Type::kUint16 : Type::kUint8;
  }
  Type type;
  int64_t size;
  std::unique_ptr<uint8_t[]> data;
};

using LeafParts = std::vector<LeafPart>;

// The states of every leaf, in tree order, out of one slot. A leaf has the codes of every state and
// then, if its format has words, the words of every state. Reads each chunk of a region once.
std::vector<LeafParts> ReadLeaves(const LockedArena& locked, int32_t slot);

// The residuals of every leaf's parameters, 256 a block; throws if the arena keeps none.
std::vector<LeafPart> ReadResiduals(const LockedArena& locked, int32_t slot);

// Other codes and words for a leaf, in the form of LeafParts. The arrays belong to the caller.
struct LeafRewrite {
  struct Bytes {
    const uint8_t* data;
    int64_t size;
  };
  size_t leaf;
  std::vector<Bytes> codes, words;  // of each state; words where the format has some
};

// Throws if they do not fit the leaves.
void CheckLeaves(const LockedArena& locked, const std::vector<LeafRewrite>& leaves);

// Writes them, which have to fit, into a slot that nobody else reads or writes.
void WriteLeaves(const LockedArena& locked, int32_t slot, const std::vector<LeafRewrite>& leaves);

}  // namespace paged_optax
