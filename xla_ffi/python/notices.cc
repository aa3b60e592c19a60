// See notices.h.
#include "python/notices.h"

#include <deque>
#include <mutex>
#include <utility>

#include "base/notice.h"
#include "python/interpreter.h"

namespace py = ::pybind11;

namespace paged_optax {
namespace {

// Notices wait here until the interpreter's main thread passes by. Posting one takes no GIL, since
// its holder may be waiting for the very lock that the poster has.
struct Notices {
  std::mutex mutex;
  std::deque<Notice> queue;
  PyObject* handler = nullptr;
};

Notices* all_notices = new Notices();

Notices& AllNotices() { return *all_notices; }

const char* NameOf(Notice::Kind kind) {
  switch (kind) {
    case Notice::Kind::kRefusal:
      return "refusal";
    case Notice::Kind::kNews:
      return "news";
    case Notice::Kind::kOther:
      break;
  }
  return "";
}

int DeliverPending(void*) {
  DeliverNotices();
  return 0;
}

}  // namespace

void PostNotice(Notice notice) {
  const InterpreterStays stays;
  if (!stays) return;
  Notices& notices = AllNotices();
  {
    std::lock_guard<std::mutex> lock(notices.mutex);
    notices.queue.push_back(std::move(notice));
  }
  Py_AddPendingCall(&DeliverPending, nullptr);
}

void SetNoticeHandler(const py::object& handler) {
  std::lock_guard<std::mutex> lock(AllNotices().mutex);
  AllNotices().handler = py::object(handler).release().ptr();  // kept until the process ends
}

// The parent's threads may have held the lock.
void ForgetNoticesOfParent() {
  PyObject* const handler = all_notices->handler;
  all_notices = new Notices();
  all_notices->handler = handler;
}

void DeliverNotices() {
  Notices& notices = AllNotices();
  for (;;) {
    Notice notice;
    {
      std::lock_guard<std::mutex> lock(notices.mutex);
      if (notices.queue.empty() || notices.handler == nullptr) return;
      notice = std::move(notices.queue.front());
      notices.queue.pop_front();
    }
    try {
      py::handle(notices.handler)(notice.ordinal, notice.missing_bytes, notice.text,
                                  NameOf(notice.kind));
    } catch (py::error_already_set& error) {
      // Where warnings are errors. This may be any place of the user's program: nothing to unwind.
      error.discard_as_unraisable("a notice of paged_optax");
    }
  }
}

}  // namespace paged_optax
