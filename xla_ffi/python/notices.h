// Hands the notices of the C++ side to Python, in the interpreter's main thread.
#pragma once

#include <pybind11/pybind11.h>

namespace paged_optax {

// `handler` is called with ordinal, missing_bytes, text and the kind: "", "refusal" or "news".
void SetNoticeHandler(const pybind11::object& handler);

// Calls the handler with what waits, now. The GIL must be held.
void DeliverNotices();

// In a forked process, before anything else.
void ForgetNoticesOfParent();

}  // namespace paged_optax
