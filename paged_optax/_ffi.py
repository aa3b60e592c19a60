"""The two XLA custom calls as JAX primitives.

Each call is a primitive of its own, because ``jax.ffi.ffi_call(has_side_effect=True)`` adds a JAX
effect, and a program with an effect leaves JAX's fast dispatch path, cannot be sharded and is not
ordered either.

Here only the compiled program has the effect, so that XLA neither drops, merges nor hoists the
calls. The order of updates comes from the token, which every update takes and returns.
"""

from typing import NoReturn

import jax
import jax.extend
import numpy as np
from jax.core import ShapedArray
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import stablehlo as hlo
from jax.interpreters import mlir

from . import _ext
from ._log import log
from ._step import Step

TOKEN_SHAPE = (2,)  # handle, version
SKIP_STEP = -(2**31)  # the count of a step that is to be skipped
NUM_SCALARS = 4  # operands of an update before the leaves: token, count, hyperparams, part

_ISSUE_TARGET = "paged_optax_issue"
_UPDATE_TARGET = "paged_optax_update"

for _name, _platform, _handler in _ext.targets():
    jax.ffi.register_ffi_target(_name, _handler, platform=_platform)

# issue_call_p: a seed -> a new token. The seed, int32 (2,), only tells apart two calls of one
# program. Static: `shared` (bool), whether other processes take part in the program.
issue_call_p = jax.extend.core.Primitive("paged_optax_issue_call")
# update_call_p: token, count, hyperparams, part, gradients, and parameters if the step takes them
# -> the advanced token, and what the step returns. Static: `step`, a `Step`.
update_call_p = jax.extend.core.Primitive("paged_optax_update_call")
issue_call_p.multiple_results = update_call_p.multiple_results = True
# position_p: nothing -> int32 (): the device's place in its mesh, over axes of all types. It is for
# code that is partitioned already, where jax.lax.axis_index would have to know the axes.
position_p = jax.extend.core.Primitive("paged_optax_position")


@issue_call_p.def_abstract_eval
def _issue_avals(seed, *, shared):
    del shared
    return [seed]


@update_call_p.def_abstract_eval
def _update_avals(token, count, hyperparams, part, *leaves, step):
    del count, hyperparams, part
    return [token, *leaves[step.replaced]]


def _lower_issue(ctx, seed, *, shared):
    lowering = jax.ffi.ffi_lowering(_ISSUE_TARGET, has_side_effect=True)
    return lowering(ctx, seed, shared=shared, site="init")


def _lower_update(ctx, *operands, step: Step):
    log.debug("an update is compiled: %s", step)
    # Each result takes the place of its gradient, or of its parameter.
    places = range(NUM_SCALARS, len(operands))[step.replaced]
    aliases = {place: 1 + i for i, place in enumerate(places)}
    lowering = jax.ffi.ffi_lowering(
        _UPDATE_TARGET, has_side_effect=True, operand_output_aliases=aliases
    )
    return lowering(ctx, *operands, **step.attributes())


@position_p.def_abstract_eval
def _position_aval():
    return ShapedArray((), np.dtype(np.int32))


def _lower_position(ctx):
    del ctx
    int32 = ir.RankedTensorType.get([], ir.IntegerType.get_signless(32))
    return [hlo.convert(int32, hlo.partition_id())]


mlir.register_lowering(position_p, _lower_position)


def _no_cuda(ctx, *operands, **static) -> NoReturn:
    del ctx, operands, static
    raise RuntimeError(
        "this program is for an NVIDIA GPU but paged_optax was built without CUDA (it was installed"
        " with PAGED_OPTAX_CUDA=OFF, or no nvcc was found). Reinstall it with PAGED_OPTAX_CUDA=ON,"
        " or run on the CPU with JAX_PLATFORMS=cpu."
    )


def _no_platform(ctx, *operands, **static) -> NoReturn:
    del operands, static
    raise NotImplementedError(
        "paged_optax runs on CPU and on NVIDIA GPUs, not on"
        f" {', '.join(ctx.module_context.platforms)}. Use optax.adamw there, or JAX_PLATFORMS=cpu."
    )


for _primitive, _lowering in ((issue_call_p, _lower_issue), (update_call_p, _lower_update)):
    mlir.register_lowering(_primitive, _no_platform)
    mlir.register_lowering(_primitive, _lowering, platform="cpu")
    mlir.register_lowering(
        _primitive, _lowering if _ext.build_info()["cuda"] else _no_cuda, platform="cuda"
    )
