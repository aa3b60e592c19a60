// Errors of a handler: no exception leaves one.
#pragma once

#include <string>

#include "base/status.h"
#include "xla/ffi/api/ffi.h"

namespace paged_optax {

inline ::xla::ffi::ErrorCode CodeOf(const StatusError& error) {
  switch (error.code()) {
    case StatusCode::kInvalidArgument:
      return ::xla::ffi::ErrorCode::kInvalidArgument;
    case StatusCode::kFailedPrecondition:
      return ::xla::ffi::ErrorCode::kFailedPrecondition;
    case StatusCode::kResourceExhausted:
      return ::xla::ffi::ErrorCode::kResourceExhausted;
    case StatusCode::kInternal:
      break;
  }
  return ::xla::ffi::ErrorCode::kInternal;
}

template <class F>
::xla::ffi::Error Guarded(F&& body) {
  try {
    body();
    return ::xla::ffi::Error::Success();
  } catch (const StatusError& error) {
    return ::xla::ffi::Error(CodeOf(error), error.what());
  } catch (const std::exception& error) {
    return ::xla::ffi::Error::Internal(std::string("paged_optax: ") + error.what());
  }
}

}  // namespace paged_optax
