// A search that leaves, arrays and pieces have in common.
#pragma once

#include "base/portable.h"

namespace paged_optax {

// The last of `count` items that begins at or before `place`, or the first one. `begin` is the
// member that says where an item begins; items are in its order.
template <class Item, class Int, class Place>
PAGED_HD Int FindLast(const Item* items, Int count, Place Item::* begin, Place place) {
  Int low = 0, high = count;
  while (high - low > 1) {
    const Int middle = (low + high) / 2;
    if (items[middle].*begin <= place) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

}  // namespace paged_optax
