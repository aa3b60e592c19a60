// What Python saves and restores moments with.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <utility>

#include "state/contents.h"

namespace paged_optax {

// Takes the bytes over.
inline pybind11::array ToPython(LeafPart part) {
  namespace py = ::pybind11;
  uint8_t* data = part.data.release();
  const py::capsule owner(data, [](void* bytes) { delete[] static_cast<uint8_t*>(bytes); });
  const auto size = static_cast<py::ssize_t>(part.size);
  if (part.type == LeafPart::Type::kUint8) return py::array_t<uint8_t>(size, data, owner);
  if (part.type == LeafPart::Type::kUint16) {
    return py::array_t<uint16_t>(size, reinterpret_cast<const uint16_t*>(data), owner);
  }
  return py::array_t<float>(size, reinterpret_cast<const float*>(data), owner);
}

void DefineCheckpoints(pybind11::module_& module);

}  // namespace paged_optax
