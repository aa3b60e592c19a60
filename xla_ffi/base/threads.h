// Loops over threads of their own, for work that is rare and long.
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

// As many as the machine has cores.
inline int64_t NumThreads() {
  return std::clamp<int64_t>(std::thread::hardware_concurrency(), 1, 16);
}

// For work that waits for a disk: enough that it always has something to do.
inline int64_t NumDiskThreads() { return std::clamp<int64_t>(NumThreads(), 4, 8); }

// Runs body(0, local) .. body(count - 1, local) on so many threads, this one included. Each has a
// `local` of its own, which `make_local` returned. Rethrows the first exception; what has not begun
// by then does not run.
template <class L, class F>
void ForEachInParallel(int64_t count, int64_t num_threads, const L& make_local, const F& body) {
  std::atomic<int64_t> next{0};
  std::exception_ptr failure;
  std::mutex mutex;
  const auto work = [&] {
    try {
      auto local = make_local();
      for (int64_t i; (i = next++) < count;) body(i, local);
    } catch (...) {
      next = count;
      const std::lock_guard<std::mutex> lock(mutex);
      if (failure == nullptr) failure = std::current_exception();
    }
  };
  std::vector<std::thread> threads;
  try {
    while (static_cast<int64_t>(threads.size()) + 1 < std::min(num_threads, count)) {
      if (PAGED_FAILS("thread")) break;
      threads.emplace_back(work);
    }
  } catch (const std::exception&) {  // the machine has no more threads: fewer do
  }
  work();
  for (std::thread& thread : threads) thread.join();
  if (failure != nullptr) std::rethrow_exception(failure);
}

// Runs body(0) .. body(count - 1) on every core, in the same way.
template <class F>
void ForEachInParallel(int64_t count, const F& body) {
  ForEachInParallel(count, NumThreads(), [] { return 0; }, [&](int64_t i, int) { body(i); });
}

}  // namespace paged_optax
