// Maps the library's exceptions to Python's.
#pragma once

#include <pybind11/pybind11.h>

#include "base/status.h"

namespace paged_optax {

// For the functions of the module that is being made.
inline void TranslateErrors() {
  pybind11::register_local_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const StatusError& error) {
      const bool memory = error.code() == StatusCode::kResourceExhausted;
      const bool argument = error.code() == StatusCode::kInvalidArgument;
      PyErr_SetString(memory     ? PyExc_MemoryError
                      : argument ? PyExc_ValueError
                                 : PyExc_RuntimeError,
                      error.what());
    }
  });
}

}  // namespace paged_optax
