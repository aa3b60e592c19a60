// Which part of each leaf a device has, out of the text that the compiled program carries. The
// writer is paged_optax/_shards.py, which explains it.
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>
#include <vector>

#include "state/signature.h"
#include "state/source.h"

namespace paged_optax {

// A device's part of a leaf.
struct LeafBox {
  std::vector<int64_t> whole;  // shape of the leaf
  Box box;
};

// Of each leaf, whose shapes on the device are those of `leaves`. `part` is the call's operand.
// Nothing if it is not known which parts the devices have. Throws if the text is malformed.
std::optional<std::vector<LeafBox>> FindBoxes(const std::vector<Signature::LeafInfo>& leaves,
                                              int64_t num_devices, std::string_view shards,
                                              int32_t part);

// A number for the shape of each leaf and for how it is cut, the same on all devices. Leaves of
// which one number is equal have equal parts.
std::vector<uint64_t> StampsOf(const std::vector<Signature::LeafInfo>& leaves,
                               std::string_view shards);

}  // namespace paged_optax
