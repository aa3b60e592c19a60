// The one exception type of the library: a message for the user with the error class that it maps
// to. Thrown anywhere below module.cc, which alone turns it into ffi::Error or a Python exception.
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
