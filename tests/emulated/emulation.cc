#include "emulation.h"

#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>

Place threadIdx, blockIdx, blockDim, gridDim;
std::vector<Copy> copies[1024];

void Fail(const char* what) {
  std::printf("%s\n", what);
  std::exit(1);
}

namespace {

constexpr size_t kStackBytes = 256 << 10;

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  bool done = false;
};

// Where a number of threads meet.
struct Meeting {
  unsigned arrived = 0, number = 0;
};

ucontext_t scheduler;
std::vector<Thread> threads;
std::vector<Meeting> warps;
Meeting block;
uint32_t values[1024];
const std::function<void()>* current;

void Pause() { swapcontext(&threads[threadIdx.x].context, &scheduler); }

void Meet(Meeting& meeting, unsigned size) {
  const unsigned number = meeting.number;
  if (++meeting.arrived == size) {
    meeting.arrived = 0;
    ++meeting.number;
  }
  while (meeting.number == number) Pause();
}

void Body() {
  (*current)();
  threads[threadIdx.x].done = true;
  Pause();
}

template <class F>
uint32_t Reduce(uint32_t value, F&& join) {
  values[threadIdx.x] = value;
  __syncwarp();
  const unsigned first = threadIdx.x / 32 * 32;
  for (unsigned i = first; i < first + 32; ++i) value = join(value, values[i]);
  __syncwarp();
  return value;
}

}  // namespace

void __syncwarp() { Meet(warps[threadIdx.x / 32], 32); }
void __syncthreads() { Meet(block, blockDim.x); }

uint32_t __shfl_sync(uint32_t, uint32_t value, int lane) {
  values[threadIdx.x] = value;
  __syncwarp();
  value = values[threadIdx.x / 32 * 32 + static_cast<unsigned>(lane) % 32];
  __syncwarp();
  return value;
}

uint32_t __reduce_max_sync(uint32_t, uint32_t value) {
  return Reduce(value, [](uint32_t a, uint32_t b) { return std::max(a, b); });
}

uint32_t __reduce_min_sync(uint32_t, uint32_t value) {
  return Reduce(value, [](uint32_t a, uint32_t b) { return std::min(a, b); });
}

void Launch(unsigned num_blocks, unsigned num_threads, const std::function<void()>& kernel) {
  current = &kernel;
  gridDim.x = num_blocks;
  blockDim.x = num_threads;
  for (blockIdx.x = 0; blockIdx.x < num_blocks; ++blockIdx.x) {
    threads = std::vector<Thread>(num_threads);
    warps = std::vector<Meeting>(num_threads / 32);
    for (std::vector<Copy>& queue : copies) queue.clear();
    for (Thread& thread : threads) {
      getcontext(&thread.context);
      thread.context.uc_stack.ss_sp = thread.stack.get();
      thread.context.uc_stack.ss_size = kStackBytes;
      makecontext(&thread.context, Body, 0);
    }
    for (unsigned left = num_threads; left > 0;) {
      for (threadIdx.x = 0; threadIdx.x < num_threads; ++threadIdx.x) {
        Thread& thread = threads[threadIdx.x];
        if (thread.done) continue;
        swapcontext(&scheduler, &thread.context);
        left -= thread.done;
      }
    }
  }
}
