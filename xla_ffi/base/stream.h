// A CUDA stream by the name that cudaStream_t stands for, so that a header can take one without
// CUDA's own headers.
#pragma once

struct CUstream_st;

namespace paged_optax {

using Stream = ::CUstream_st*;

}  // namespace paged_optax
