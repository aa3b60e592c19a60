// What the user is told when a step was refused: the problem, its probable cause and the remedy.
#pragma once

#include <string>

#include "layout/token.h"
#include "state/arena.h"
#include "state/device_id.h"
#include "state/handles.h"

namespace paged_optax {

// What is known of a refused step.
struct Refusal {
  Verdict verdict;
  DeviceId device;  // that the step ran on
  Token token;
  int32_t version;                     // the newest of the moments there
  Handles::Origin origin;              // of the token's handle
  const Arena* here = nullptr;         // the moments on this device; null if there are none
  const Arena* anywhere = nullptr;     // those on any device
  const Signature* request = nullptr;  // what the step would have needed; null if not known
};

std::string Explain(const Refusal& refusal);

}  // namespace paged_optax
