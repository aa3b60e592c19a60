// See norm_handlers.h. The call is a function of its operands: it keeps no books, and has no side
// effect. Operands: a scalar, which only has the type of the result, and one gradient a leaf.
// Result: the norm, f32[].
#include "xla/norm_handlers.h"

#include <limits>
#include <string>

#include "step/norm_cpu.h"
#include "xla/call.h"
#include "xla/guarded.h"
#include "xla/parallel_for.h"

#if PAGED_OPTAX_CUDA
#include "base/cuda_check.h"
#include "step/norm_cuda.h"
#include "xla/scratch.h"
#endif

namespace ffi = ::xla::ffi;

namespace paged_optax {
namespace {

struct NormCall {
  std::vector<NormLeaf> leaves;
  int32_t num_pieces = 0;
};

NormCall ParseNorm(const ffi::RemainingArgs& args) {
  NormCall call;
  call.leaves.reserve(args.size());
  for (size_t i = 0; i < args.size(); ++i) {
    const ffi::AnyBuffer grad = *args.get<ffi::AnyBuffer>(i);
    const auto size = static_cast<int64_t>(grad.element_count());
    call.leaves.push_back(
        {grad.untyped_data(), size, call.num_pieces, DTypeOf(grad.element_type())});
    if (NumPieces(size) > std::numeric_limits<int32_t>::max() - call.num_pieces) {
      throw StatusError(StatusCode::kInvalidArgument,
                        "the norm of more than 3 * 10^13 elements on one device is not supported");
    }
    call.num_pieces += static_cast<int32_t>(NumPieces(size));
  }
  return call;
}

using Scalar = ffi::BufferR0<ffi::F32>;

ffi::Error NormCpu(ffi::ThreadPool pool, Scalar /*like*/, ffi::RemainingArgs grads,
                   ffi::Result<Scalar> norm) {
  return Guarded([&] {
    const NormCall call = ParseNorm(grads);
    std::vector<double> pieces(call.num_pieces);
    const int num_leaves = static_cast<int>(call.leaves.size());
    ParallelFor(pool, call.num_pieces, [&](int64_t i) {
      const auto piece = static_cast<int32_t>(i);
      const int leaf = FindLast(call.leaves.data(), num_leaves, &NormLeaf::first_piece, piece);
      pieces[i] = SumPiece(call.leaves[leaf], piece);
    });
    *norm->typed_data() = NormOf(pieces);
  });
}

XLA_FFI_DEFINE_HANDLER(kNormCpu, NormCpu,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Arg<Scalar>()    // like
                           .RemainingArgs()  // gradients
                           .Ret<Scalar>());  // norm

#if PAGED_OPTAX_CUDA

ffi::Error NormCuda(cudaStream_t stream, ffi::ScratchAllocator scratch, int32_t device,
                    Scalar /*like*/, ffi::RemainingArgs grads, ffi::Result<Scalar> norm) {
  return Guarded([&] {
    const NormCall call = ParseNorm(grads);
    const Scratch memory(scratch, NormScratchBytes(call.num_pieces), device, stream);
    LaunchNorm(call.leaves.data(), static_cast<int64_t>(call.leaves.size()), call.num_pieces,
               memory.data(), norm->typed_data(), device, stream);
  });
}

XLA_FFI_DEFINE_HANDLER(kNormCuda, NormCuda,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::PlatformStream<cudaStream_t>>()
                           .Ctx<ffi::ScratchAllocator>()
                           .Ctx<ffi::DeviceOrdinal>()
                           .Arg<Scalar>()    // like
                           .RemainingArgs()  // gradients
                           .Ret<Scalar>());  // norm

#endif  // PAGED_OPTAX_CUDA

}  // namespace

std::vector<HandlerEntry> NormHandlers() {
  return {
      {"paged_optax_norm", "cpu", reinterpret_cast<void*>(kNormCpu)},
#if PAGED_OPTAX_CUDA
      {"paged_optax_norm", "CUDA", reinterpret_cast<void*>(kNormCuda)},
#endif
  };
}

}  // namespace paged_optax
