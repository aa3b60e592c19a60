// Lets threads of the library and of XLA into the Python interpreter until it ends.
//
// A thread that asks for the GIL after the interpreter began to end never gets it. Before Python
// 3.14 such a thread is ended by an unwinding that no destructor survives: the process aborts.
#pragma once

#include <pybind11/pybind11.h>

namespace paged_optax {

// While one lives and is true, the interpreter does not end. Taking it needs no GIL.
class InterpreterStays {
 public:
  InterpreterStays();
  ~InterpreterStays();
  InterpreterStays(const InterpreterStays&) = delete;
  InterpreterStays& operator=(const InterpreterStays&) = delete;

  explicit operator bool() const { return stays_; }

 private:
  bool stays_;
};

// While one lives, its thread does without the GIL. If the interpreter ends meanwhile, the thread
// stays here for as long as the process lasts, as from Python 3.14 on. Use it in place of
// py::gil_scoped_release: a daemon thread may be in any function of the module when Python ends.
class WithoutGil {
 public:
  WithoutGil() : state_(PyEval_SaveThread()) {}
  ~WithoutGil();
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

 private:
  PyThreadState* state_;
};

// At Python's exit, without the GIL: nobody comes in from now on. Waits for those who are inside.
void CloseInterpreter();

// In a forked process, before anything else: the parent's threads are not here.
void ForgetThreadsInInterpreter();

}  // namespace paged_optax
