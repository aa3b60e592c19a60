// See copies.h.
#include "state/copies.h"

#include <string>

#include "base/notice.h"

namespace paged_optax {

void Copies::Note(DeviceId device, int32_t state, const void* param) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (told_) return;
    if (last_.size() > 1000) last_.clear();  // of states that are long gone
    Last& last = last_[{device, state}];
    last.num_moves = last.param == param ? 0 : last.num_moves + 1;
    last.param = param;
    if (last.num_moves <= kSteps) return;
    told_ = true;
    last_.clear();
  }
  PostNotice({device.ordinal, 0,
              "the parameters were copied before each of the last " + std::to_string(kSteps) +
                  " steps in place, because they were not donated or something else moves them."
                  " Donate parameters and optimizer state to the program: jax.jit(step,"
                  " donate_argnums=...). Outside of jax.jit nothing can be donated."});
}

}  // namespace paged_optax
