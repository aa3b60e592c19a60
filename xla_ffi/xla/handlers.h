// The XLA custom calls: decode what XLA hands over, pick the device's way, return errors.
#pragma once

#include <utility>
#include <vector>

namespace paged_optax {

struct HandlerEntry {
  const char* target;
  const char* platform;
  void* handler;  // XLA_FFI_Handler*
};

std::vector<HandlerEntry> Handlers();

// The names and types of the attributes of an update, sorted by name.
std::vector<std::pair<const char*, const char*>> UpdateAttributes();

// Of the headers that this was built with: major, minor.
std::pair<int, int> FfiApiVersion();

}  // namespace paged_optax
