// Maps the library's exceptions to Python's.
#pragma once

#include <pybind11/pybind11.h>

#include "base/status.h"

namespace paged_optax {

// For the functions of the module that is being made. `state_refused` is paged_optax.StateRefused,
// which lives as long as the process.
inline void TranslateErrors(pybind11::handle state_refused) {
  static PyObject* refused_type;
  refused_type = state_refused.ptr();
  pybind11::register_local_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const StatusError& error) {
      const bool memory = error.code() == StatusCode::kResourceExhausted;
      const bool argument = error.code() == StatusCode::kInvalidArgument;
      const bool refused = error.code() == StatusCode::kFailedPrecondition;
      PyErr_SetString(memory     ? PyExc_MemoryError
                      : argument ? PyExc_ValueError
                      : refused  ? refused_type
                                 : PyExc_RuntimeError,
                      error.what());
    }
  });
}

}  // namespace paged_optax
