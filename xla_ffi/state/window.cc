// See window.h.
#include "state/window.h"

#include <algorithm>

#include "layout/small_codes.h"
#include "step/params.h"

namespace paged_optax {

void Window::Reset(int64_t num_blocks, int64_t size, const Transcoder& transcoder) {
  num_blocks_ = num_blocks;
  size_ = size;
  const int64_t nbytes = num_blocks * kBlockSize * shape_.code_bytes;
  for (int32_t s = 0; s < shape_.num_states; ++s) {
    codes_[s].resize(nbytes);
    std::fill(codes_[s].end() - kBlockSize * shape_.code_bytes, codes_[s].end(),
              transcoder.zero(s));
  }
  words_.assign(num_blocks * shape_.num_words, 0);
  residuals_.assign(num_blocks * shape_.residual_bytes, kZeroResidual);
}

void WriteWindow(const Window& window, const Region& region, int64_t first, Memory& memory,
                 int32_t slot) {
  const BlockShape& shape = region.shape;
  std::vector<uint8_t> packed;
  ForEachRun(
      region, first, window.num_blocks(), [&](const BlockPlace& place, int64_t done, int64_t run) {
        for (int32_t s = 0; s < shape.num_states; ++s) {
          memory.Write(slot, place.codes + s * place.state_stride, run * shape.state_bytes,
                       PackCodes(shape, window.codes(s) + done * PlainBytes(shape), run, packed));
        }
        memory.Write(slot, place.residuals, run * shape.residual_bytes,
                     window.residuals() + done * shape.residual_bytes);
        memory.Write(slot, place.words, run * shape.num_words * 4,
                     window.words() + done * shape.num_words);
      });
}

}  // namespace paged_optax
