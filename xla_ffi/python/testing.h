// What only the tests ask of the C++ side. Called by module.cc.
#pragma once

#include <pybind11/pybind11.h>

namespace paged_optax {

void AddTestHooks(pybind11::module_& module);

}  // namespace paged_optax
