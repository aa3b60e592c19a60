// Whether the parameters of steps in place are copied before each step, which a caller can avoid.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <utility>

#include "state/device_id.h"

namespace paged_optax {

// A step in place leaves parameters where it found them. If they were donated, the next step finds
// them there. If not, XLA copies them first, to where no parameters of the caller are: so each step
// finds them at another place than the step before.
class Copies {
 public:
  // Notes where the first parameter of a step is, and posts a notice, once a process, when it has
  // been elsewhere for kSteps steps in a row. `state` tells states on a device apart.
  void Note(DeviceId device, int32_t state, const void* param);

  static constexpr int kSteps = 32;

 private:
  struct Last {
    const void* param = nullptr;
    int num_moves = 0;  // in a row
  };

  std::mutex mutex_;
  std::map<std::pair<DeviceId, int32_t>, Last> last_;
  bool told_ = false;
};

}  // namespace paged_optax
