// Host memory that was promised to moments. What is promised is not yet taken: the operating system
// makes pages when a step first touches them, and the CUDA driver may send managed memory to the
// host at any time. So whoever is promised memory has to know what others may still take.
#pragma once

#include <cstdint>
#include <functional>

namespace paged_optax {

class Promises;

// A promise of host memory, for as long as it lives.
class HostPromise {
 public:
  // Throws if the machine has no room for so many bytes, next to what all promises of this process
  // may still take. Waits for those that are just being kept.
  explicit HostPromise(int64_t nbytes);
  HostPromise(const HostPromise&) = delete;
  ~HostPromise() { End(); }

  // The memory was made. From now on the promise counts only what may still be taken, as this
  // function says. Any thread calls it, until End.
  void Keep(std::function<int64_t()> untaken);
  void End();

 private:
  Promises* promises_;
  int64_t number_;
};

// What all promises may still take.
int64_t PromisedBytes();

// For the tests: as if so many bytes were available before any promise; negative: what is.
void PretendAvailable(int64_t nbytes);

}  // namespace paged_optax
