// Random bits for stochastic rounding: a hash of (key of the leaf, step, index of the element),
// so nothing is stored and a resumed run draws the same. Used for parameters by the CPU loop and
// the CUDA kernel (moments: ratio.h); specified in NumPy by paged_optax/_reference.py.
//
// One word an element, in about ten integer instructions. Who needs several small numbers takes
// them from different bits of it. Parts of a sharded leaf count from 0 on each device, so equal
// places of two shards draw the same bits, and so do all copies of a replicated leaf, which have to
// agree.
//
// Method: two rounds of multiplication and shift (constants of C. Wellons, "Prospecting for Hash
// Functions", 2018, chosen there for the least bias), with one key before the first round and
// another between the two. For any key it is a bijection of the low 32 bits of the index.
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

}  // namespace paged_optax
