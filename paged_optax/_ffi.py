"""The two XLA custom calls as JAX primitives.

The only module that imports the extension's handlers. Each call is a primitive of its own, because
``jax.ffi.ffi_call(has_side_effect=True)`` adds a JAX effect, and a program with an effect leaves JAX's
fast dispatch path, cannot be sharded and is not ordered either. Here the effect is in the compiled program
only, so that XLA neither drops, merges nor hoists the call, and the order comes from the token, which
every update takes and returns.
"""

import functools
from typing import NoReturn

import jax
import jax.extend
import numpy as np
from jax.interpreters import ad, batching, mlir

from . import _ext

TOKEN_SHAPE = (2,)  # handle, version
ISSUE_TARGET = "paged_optax_issue"
UPDATE_TARGET = "paged_optax_update"
_NUM_SCALARS = 3  # token, count, hyperparams: the operands before the gradients

for _name, _platform, _handler in _ext.targets():
    jax.ffi.register_ffi_target(_name, _handler, platform=_platform)

issue_p = jax.extend.core.Primitive("paged_optax_issue")
update_p = jax.extend.core.Primitive("paged_optax_update")
update_p.multiple_results = True


def issue(seed: jax.Array) -> jax.Array:
    """Makes a token for a new state.

    Args:
      seed: int32 of shape (2,), any value. Two calls in one program must differ in it, or the compiler may
        merge them.

    Returns:
      int32 of shape (2,): a handle that no other state has, and version 0.
    """
    return issue_p.bind(seed)


def update(token, count, hyperparams, grads, **static) -> tuple[jax.Array, list[jax.Array]]:
    """Advances the moments of `token` by one step.

    Args:
      token: int32 of shape (2,).
      count: int32 of shape (), the number of steps already taken.
      hyperparams: float32 of shape (4,): b1, b2, eps, eps_root.
      grads: gradients, in tree order.
      **static: ``codecs`` (a tuple of ints, the codec of each leaf), ``nesterov`` (bool), ``tree`` (int,
        names the tree structure), ``device_bytes`` and ``headroom_bytes`` (int).

    Returns:
      The token of the advanced moments, and the updates in the gradients' buffers, shapes and dtypes.
    """
    token, *updates = update_p.bind(token, count, hyperparams, *grads, **static)
    return token, updates


@issue_p.def_abstract_eval
def _issue_abstract(seed):
    return seed


@update_p.def_abstract_eval
def _update_abstract(token, count, hyperparams, *grads, **static):
    del count, hyperparams, static
    return [token, *grads]


@issue_p.def_impl
def _issue_impl(seed):
    with jax.disable_jit(False):  # a custom call has to be compiled, also under jax.disable_jit()
        return _issue_jit(seed)


@jax.jit
def _issue_jit(seed):
    return issue_p.bind(seed)


@update_p.def_impl
def _update_impl(*args, **static):
    with jax.disable_jit(False):
        return _update_jit(tuple(static.items()), *args)


@functools.partial(jax.jit, static_argnums=0)
def _update_jit(static, *args):
    return update_p.bind(*args, **dict(static))


def _lower_issue(ctx, seed):
    return jax.ffi.ffi_lowering(ISSUE_TARGET, has_side_effect=True)(ctx, seed)


def _lower_update(ctx, *operands, codecs, nesterov, tree, device_bytes, headroom_bytes):
    aliases = {_NUM_SCALARS + i: 1 + i for i in range(len(codecs))}
    lowering = jax.ffi.ffi_lowering(
        UPDATE_TARGET, has_side_effect=True, operand_output_aliases=aliases
    )
    return lowering(
        ctx,
        *operands,
        codecs=np.array(codecs, np.int8),
        nesterov=nesterov,
        tree=np.int64(tree),
        device_bytes=np.int64(device_bytes),
        headroom_bytes=np.int64(headroom_bytes),
    )


def _no_cuda(ctx, *operands, **static) -> NoReturn:
    del ctx, operands, static
    raise RuntimeError(
        "this program is for an NVIDIA GPU but paged_optax was built without CUDA (it was installed with"
        " PAGED_OPTAX_CUDA=OFF). Reinstall it without that setting, or run on CPU with"
        " JAX_PLATFORMS=cpu."
    )


def _no_platform(ctx, *operands, **static) -> NoReturn:
    del operands, static
    raise NotImplementedError(
        f"paged_optax runs on CPU and on NVIDIA GPUs, not on {', '.join(ctx.module_context.platforms)}."
        " Use optax.adamw there, or JAX_PLATFORMS=cpu."
    )


for _primitive, _lowering in ((issue_p, _lower_issue), (update_p, _lower_update)):
    mlir.register_lowering(_primitive, _no_platform)
    mlir.register_lowering(_primitive, _lowering, platform="cpu")
    mlir.register_lowering(
        _primitive, _lowering if _ext.build_info()["cuda"] else _no_cuda, platform="cuda"
    )


def _no_vmap(*args, **static) -> NoReturn:
    del args, static
    raise NotImplementedError(
        "a paged optimizer cannot be vmapped: its moments are one memory that every mapped copy would write"
        " to. Stack the models' parameters along a leading axis and update them as one tree, or step"
        " each model in a loop."
    )


def _no_gradient(*args, **static) -> NoReturn:
    del args, static
    raise TypeError(
        "a paged optimizer's update cannot be differentiated: its moments are outside JAX. Use"
        " optax.adamw to differentiate through a step, or jax.lax.stop_gradient on the gradients that"
        " go into it."
    )


for _primitive in (issue_p, update_p):
    batching.primitive_batchers[_primitive] = _no_vmap
    ad.primitive_jvps[_primitive] = _no_gradient
