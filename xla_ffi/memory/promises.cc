// See promises.h.
#include "memory/promises.h"

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <map>
#include <mutex>

#include "memory/preflight.h"

namespace paged_optax {
namespace {

constexpr std::chrono::seconds kPatience{60};

std::atomic<int64_t> g_pretended{-1};
std::atomic<Promises*> g_current{nullptr};

// In a forked process, which has no memory of its parent's, and none of the threads that may hold a
// lock.
void ForgetParent() { g_current = nullptr; }

}  // namespace

// All promises of this process.
class Promises {
 public:
  static Promises& Get() {
    if (Promises* promises = g_current) return *promises;
    [[maybe_unused]] static const int is_watching = pthread_atfork(nullptr, nullptr, &ForgetParent);
    Promises* made = new Promises();
    Promises* other = nullptr;
    if (g_current.compare_exchange_strong(other, made)) return *made;
    delete made;
    return *other;
  }

  int64_t Add(int64_t nbytes) {
    std::unique_lock<std::mutex> lock(mutex_);
    const int64_t pretended = g_pretended;
    for (bool is_patient = true;;) {
      const int64_t available = pretended < 0 ? AvailableHostBytes() : pretended;
      const int64_t promised = Promised(pretended >= 0);
      // Memory that is just being made counts twice, as promised and as no longer available.
      if (num_unkept_ == 0 || !is_patient) CheckHostMemory(nbytes, available, promised);
      if (nbytes <= available - promised) break;
      is_patient = changed_.wait_for(lock, kPatience) == std::cv_status::no_timeout;
    }
    promises_[next_] = {nbytes, nullptr};
    ++num_unkept_;
    return next_++;
  }

  int64_t Sum() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return Promised(/*is_pretended=*/false);
  }

  void Keep(int64_t number, std::function<int64_t()> untaken) {
    const std::lock_guard<std::mutex> lock(mutex_);
    promises_.at(number).untaken = std::move(untaken);
    --num_unkept_;
    changed_.notify_all();
  }

  void Remove(int64_t number) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = promises_.find(number);
    if (found->second.untaken == nullptr) --num_unkept_;
    promises_.erase(found);
    changed_.notify_all();
  }

 private:
  struct Entry {
    int64_t nbytes;
    std::function<int64_t()> untaken;  // null as long as the memory is being made
  };

  // Of bytes that are only pretended, none is ever taken.
  int64_t Promised(bool is_pretended) const {
    int64_t sum = 0;
    for (const auto& [number, entry] : promises_) {
      sum += entry.untaken == nullptr || is_pretended ? entry.nbytes : entry.untaken();
    }
    return sum;
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::map<int64_t, Entry> promises_;
  int64_t next_ = 0;
  int num_unkept_ = 0;
};

HostPromise::HostPromise(int64_t nbytes)
    : promises_(&Promises::Get()), number_(promises_->Add(nbytes)) {}

void HostPromise::Keep(std::function<int64_t()> untaken) {
  promises_->Keep(number_, std::move(untaken));
}

void HostPromise::End() {
  // One of a parent process does not count here, and its lock may be held for good.
  if (promises_ != nullptr && promises_ == g_current) promises_->Remove(number_);
  promises_ = nullptr;
}

int64_t PromisedBytes() { return Promises::Get().Sum(); }

void PretendAvailable(int64_t nbytes) { g_pretended = nbytes; }

}  // namespace paged_optax
