// See interpreter.h.
#include "python/interpreter.h"

#include <unistd.h>

#include <atomic>
#include <chrono>
#include <thread>

namespace paged_optax {
namespace {

std::atomic<bool> is_closed{false};
std::atomic<int> num_inside{0};

}  // namespace

// Counts first and looks afterwards, while CloseInterpreter closes first and counts afterwards: one
// of the two sees the other.
InterpreterStays::InterpreterStays() {
  num_inside.fetch_add(1);
  stays_ = !is_closed.load();
}

InterpreterStays::~InterpreterStays() { num_inside.fetch_sub(1); }

WithoutGil::~WithoutGil() {
  try {
    PyEval_RestoreThread(state_);
  } catch (...) {  // by pthread_exit, which ends the process where no one may catch it
    for (;;) pause();
  }
}

void CloseInterpreter() {
  is_closed.store(true);
  while (num_inside.load() > 0) std::this_thread::sleep_for(std::chrono::microseconds(100));
}

void ForgetThreadsInInterpreter() { num_inside.store(0); }

}  // namespace paged_optax
