// How a handler ends: errors are returned, and refused steps are noted.
#pragma once

#include <exception>
#include <string>

#include "base/status.h"
#include "state/registry.h"
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

// A refused step leaves everything as it was: its updates are zero, and its token is the one that
// came in. So no program fails, and no donated array is lost; Python raises what was noted. Errors
// that are no refusals are those of the program.
template <class F, class G>
void OrRefuse(const F& step, Token token, const G& leave_alone) {
  try {
    step();
  } catch (const StatusError& error) {
    if (error.code() != StatusCode::kFailedPrecondition) throw;
    Registry::Get().NoteRefused(token, error.what());
    leave_alone();
  }
}

// No exception leaves a handler.
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
