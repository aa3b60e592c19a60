// See leaf_work.h.
#include "state/leaf_work.h"

#include "base/status.h"

namespace paged_optax {

void LeafWork::CheckValues(Window& window) const {
  const int32_t num_words = shape.num_words;
  for (int64_t i = 0; i < window.num_blocks() * num_words; ++i) {
    const bool is_padded = (i / num_words + 1) * kBlockSize > window.size();
    const auto state = static_cast<int32_t>(i % num_words);
    if (!transcoder.may_store_word(state, window.words()[i], is_padded)) RefuseValues();
  }
  for (int32_t s = 0; s < shape.num_states; ++s) {
    if (!transcoder.may_store_codes(s, window.codes(s), window.size())) RefuseValues();
  }
}

void LeafWork::RefuseValues() const {
  throw StatusError(StatusCode::kInvalidArgument,
                    "paged_optax: the checkpoint's moments of " + source.NameOf(leaf) +
                        " have values that no step stores, so it is damaged. Nothing was changed;"
                        " restore another checkpoint, or start with init(params).");
}

}  // namespace paged_optax
