// Failures on demand. In a test build a call that is written as PAGED_CALL can be made to fail, as
// the system would make it fail; in the product PAGED_CALL is the call and nothing else.
#pragma once

#if PAGED_OPTAX_TESTING

#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <string>

namespace paged_optax {

// The one failure that is asked for.
class Faults {
 public:
  static Faults& Get() {
    static Faults* faults = new Faults();
    return *faults;
  }

  // Lets `after` calls of this name pass, or of any name if it is empty, and fails the next one. An
  // error below 0 is a time in ms: the call only takes so much longer, or until Withdraw.
  void Ask(const std::string& name, int after, int error) {
    const std::lock_guard<std::mutex> lock(mutex_);
    name_ = name;
    after_ = after;
    error_ = error;
    is_asked_ = true;
  }

  // Whether a call still has to fail.
  bool IsAsked() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return is_asked_;
  }

  // The name of the call that failed last.
  std::string Last() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return last_;
  }

  // Calls that were to pass and have not come yet, since the last Ask.
  int NumLeft() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return after_;
  }

  // Withdraws what was asked for; returns whether no call has failed for it yet.
  bool Withdraw() {
    const std::lock_guard<std::mutex> lock(mutex_);
    const bool was_asked = is_asked_;
    is_asked_ = false;
    ++num_withdrawn_;
    withdrawn_.notify_all();
    return was_asked;
  }

  // Whether the call at hand has to fail. If so, errno is set. `call` starts with the name.
  bool Take(const std::string& call) {
    std::unique_lock<std::mutex> lock(mutex_);
    const int error = Next(call.substr(0, call.find('(')));
    if (error < 0) {
      withdrawn_.wait_for(lock, std::chrono::milliseconds(-error),
                          [this, before = num_withdrawn_] { return num_withdrawn_ != before; });
    }
    if (error > 0) errno = error;
    return error > 0;
  }

 private:
  // 0 for none. Needs the lock.
  int Next(const std::string& name) {
    if (!is_asked_ || (!name_.empty() && name_ != name) || after_-- > 0) return 0;
    is_asked_ = false;
    last_ = name;
    return error_;
  }

  std::mutex mutex_;
  std::condition_variable withdrawn_;
  int num_withdrawn_ = 0;
  std::string name_;
  std::string last_;
  int after_ = 0;
  int error_ = 0;
  bool is_asked_ = false;
};

}  // namespace paged_optax

// `failed` is what the call returns when it fails; it may use errno.
#define PAGED_CALL(name, failed, ...) \
  (::paged_optax::Faults::Get().Take(#name) ? (failed) : name(__VA_ARGS__))
// Whether something that is no single call has to fail.
#define PAGED_FAILS(name) ::paged_optax::Faults::Get().Take(name)

#else

#define PAGED_CALL(name, failed, ...) name(__VA_ARGS__)
#define PAGED_FAILS(name) false

#endif  // PAGED_OPTAX_TESTING
