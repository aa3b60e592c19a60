// Lets threads of the library and of XLA into the Python interpreter until it ends.
//
// A thread that asks for the GIL after the interpreter began to end never gets it: Python 3.11 ends
// the thread by an unwinding that no destructor survives, and the process aborts.
#pragma once

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

// At Python's exit, without the GIL: nobody comes in from now on. Waits for those who are inside.
void CloseInterpreter();

// In a forked process, before anything else: the parent's threads are not here.
void ForgetThreadsInInterpreter();

}  // namespace paged_optax
