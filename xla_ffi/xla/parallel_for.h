// A loop over the threads of XLA's pool.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>

#include "xla/ffi/api/ffi.h"

namespace paged_optax {

constexpr int64_t kBlocksPerTask = 64;  // of a loop over blocks

// Runs body(0) .. body(count - 1) on the calling thread and on those threads of the pool that are
// free. The caller never waits for a task that has not started: pool threads may all be busy with
// other handlers that wait in the same way.
template <class F>
void ParallelFor(::xla::ffi::ThreadPool& pool, int64_t count, const F& body) {
  struct Progress {
    std::atomic<int64_t> next{0};
    int64_t done = 0;
    std::mutex mutex;
    std::condition_variable all_done;
  };
  auto progress = std::make_shared<Progress>();
  const F* shared_body = &body;  // valid while tasks remain, and only then used
  auto work = [progress, shared_body, count] {
    int64_t finished = 0;
    for (int64_t i; (i = progress->next++) < count; ++finished) (*shared_body)(i);
    if (finished == 0) return;
    std::lock_guard<std::mutex> lock(progress->mutex);
    progress->done += finished;
    if (progress->done == count) progress->all_done.notify_all();
  };
  const int64_t helpers = std::min(pool.num_threads(), count) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule(decltype(work)(work));
  work();
  std::unique_lock<std::mutex> lock(progress->mutex);
  progress->all_done.wait(lock, [&] { return progress->done == count; });
}

}  // namespace paged_optax
