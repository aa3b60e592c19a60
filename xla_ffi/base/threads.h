// A loop over threads of its own, for work that is rare and long.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include "base/faults.h"

namespace paged_optax {

// Runs body(0) .. body(count - 1) on as many threads as the machine has cores, this one included.
// Rethrows the first exception; what has not begun by then does not run.
template <class F>
void ForEachInParallel(int64_t count, const F& body) {
  std::atomic<int64_t> next{0};
  std::exception_ptr failure;
  std::mutex mutex;
  const auto work = [&] {
    try {
      for (int64_t i; (i = next++) < count;) body(i);
    } catch (...) {
      next = count;
      const std::lock_guard<std::mutex> lock(mutex);
      if (failure == nullptr) failure = std::current_exception();
    }
  };
  const int64_t cores = std::clamp<int64_t>(std::thread::hardware_concurrency(), 1, 16);
  std::vector<std::thread> threads;
  try {
    while (static_cast<int64_t>(threads.size()) + 1 < std::min(cores, count)) {
      if (PAGED_FAILS("thread")) break;
      threads.emplace_back(work);
    }
  } catch (const std::exception&) {  // the machine has no more threads: fewer do
  }
  work();
  for (std::thread& thread : threads) thread.join();
  if (failure != nullptr) std::rethrow_exception(failure);
}

}  // namespace paged_optax
