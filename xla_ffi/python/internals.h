// The extension's own instances, for the tests. A test build has a second module, _testing, that
// must not have a registry of its own; so _ext hands it these functions, as a capsule.
#pragma once

#include <cstdint>
#include <string>

#include "base/notice.h"

namespace paged_optax {

struct Internals {
  static constexpr char kName[] = "paged_optax._ext.Internals";  // of the capsule

  int64_t (*num_arenas)();
  void (*throw_if_refused)();
  void (*post_notice)(Notice notice);
  void (*deliver_notices)();
  void (*pretend_not_managed)(bool pretend);
  void (*pretend_available)(int64_t nbytes);
  int64_t (*promised_bytes)();
  // base/faults.h; nothing in a build without tests.
  void (*ask_for_failure)(const std::string& call, int after, int error);
  bool (*withdraw_failure)();
  bool (*is_failure_asked)();
  std::string (*danger_of)(long file_system);
};

}  // namespace paged_optax
