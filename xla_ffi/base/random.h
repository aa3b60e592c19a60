// Random bits for stochastic rounding. They follow from the key of the leaf, the step and the index
// of the element, so nothing is stored and a resumed run draws the same bits. Specified in NumPy by
// paged_optax/_reference.
//
// An element draws one word. Code that needs several small numbers takes them from different bits
// of it. Parts of a sharded leaf count from 0 on each device, so equal places of two shards draw
// the same bits. So do all copies of a replicated leaf, which have to agree.
//
// Parameters take a hash, in about ten integer instructions: two rounds of multiplication and shift
// (constants of C. Wellons, "Prospecting for Hash Functions", 2018, chosen there for the least
// bias), with one key before the first round and another between the two. For any key it is a
// bijection of the low 32 bits of the index.
#pragma once

#include "base/portable.h"

namespace paged_optax {

struct RandomKey {
  uint32_t before;
  uint32_t between;
};

PAGED_HD uint32_t RandomBits(RandomKey key, uint32_t index) {
  uint32_t x = index ^ key.before;
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15) ^ key.between) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// The part of the key that all leaves share. `count` is the number of steps already taken.
PAGED_HD RandomKey StepKey(int32_t count) {
  const uint32_t step = static_cast<uint32_t>(count);
  return {RandomBits({0x9e3779b9u, 0x7f4a7c15u}, step),
          RandomBits({0xbf58476du, 0x94d049bbu}, step)};
}

// The key for the elements from `start` on, up to the next multiple of 2^32. `leaf` names the leaf.
PAGED_HD RandomKey BlockKey(RandomKey step, uint64_t leaf, int64_t start) {
  const uint32_t place =
      static_cast<uint32_t>(leaf >> 32) ^ static_cast<uint32_t>(start >> 32) * 0x9e3779b1u;
  // What enters only between the rounds reaches too few bits.
  return {step.before ^ static_cast<uint32_t>(leaf) ^ place * 0xc2b2ae3du, step.between ^ place};
}

// States take evenly spread numbers. The word that decides for element i of a leaf at the step
// after `count` steps is DitherStart(leaf, i) + DitherPhase(count). Along the steps and along the
// elements it runs through sequences that fill [0, 2^32) evenly (H. Weyl's, with the golden ratio
// and with the plastic number). Of n such draws, n p fall below p up to an error of order log n;
// independent draws would leave an error of sqrt(n). Second moments average over a thousand steps,
// so this is what they see. A hash of the element in place of the second sequence follows float32
// no better and takes a tenth of a GPU's step.
//
// After 89 steps, and every other Fibonacci number, the first sequence almost repeats. Gradients
// with the same period, such as those of a data set in a fixed order, would then be rounded alike
// forever. So the sequence starts anew every 128 steps.
inline constexpr uint32_t kDitherStride = 0xc13fa9a9u;

PAGED_HD uint32_t DitherPhase(int32_t count) {
  const uint32_t step = static_cast<uint32_t>(count);
  return step * 0x9e3779b9u + RandomBits({0x9e3779b9u, 0x7f4a7c15u}, step >> 7);
}

PAGED_HD uint32_t DitherStart(uint64_t leaf, int64_t element) {
  return static_cast<uint32_t>(leaf ^ (leaf >> 32)) +
         static_cast<uint32_t>(element) * kDitherStride;
}

// The words of a lane's elements, of which the first has `start`.
struct Dither {
  uint32_t start;
  PAGED_HD uint32_t operator()(int k) const {
    return start + static_cast<uint32_t>(k) * kDitherStride;
  }
};

// A half in the upper and in the lower 16 bits: what takes such a word rounds to nearest.
struct ToNearest {
  PAGED_HD uint32_t operator()(int) const { return 0x80008000u; }
};

}  // namespace paged_optax
