// The one exception type of the library: a message for the user, and the class of error. The XLA
// handlers turn it into ffi::Error, the Python module into a Python exception.
#pragma once

#include <stdexcept>
#include <string>

namespace paged_optax {

enum class StatusCode { kInvalidArgument, kFailedPrecondition, kResourceExhausted, kInternal };

class StatusError : public std::runtime_error {
 public:
  StatusError(StatusCode code, const std::string& message)
      : std::runtime_error(message), code_(code) {}
  StatusCode code() const { return code_; }

 private:
  StatusCode code_;
};

}  // namespace paged_optax
