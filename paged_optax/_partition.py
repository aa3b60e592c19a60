"""How one call is spread over devices: each works on its own shards, and no data moves.

A bare custom call on sharded operands is compiled as an all-gather and the whole work on every
device. There are three cases to keep it local: inside `jax.shard_map` operands are shards
already; on a mesh of Explicit axes the specs are in the types, and `jax.shard_map` cuts along
them; otherwise `custom_partitioning` tells the partitioner that every dimension may be sharded in
any way. Tokens are replicated: every device keeps the moments of its shards under the same handle.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NoReturn

import jax
import jax.extend
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from . import _ffi


def issue(seed: jax.typing.ArrayLike) -> jax.Array:
    """Makes a token for a new state.

    Args:
      seed: int32 of shape (2,), any value. Two calls in one program must differ in it, or the
        compiler may merge them.

    Returns:
      int32 of shape (2,): a handle that no other state has, and version 0.
    """
    (token,) = _spread(_ffi.issue_call_p, (jnp.asarray(seed),), num_replicated=1)
    return token


def update(
    token: jax.Array,
    count: jax.Array,
    hyperparams: jax.typing.ArrayLike,
    grads: Sequence[jax.Array],
    **static: Any,
) -> tuple[jax.Array, list[jax.Array]]:
    """Advances the moments of `token` by one step.

    Args:
      token: int32 of shape (2,).
      count: int32 of shape (), the number of steps already taken.
      hyperparams: float32 of shape (4,): b1, b2, eps, eps_root.
      grads: gradients, in tree order.
      **static: ``codecs`` (tuple of int, the codec of each leaf), ``nesterov`` (bool), ``tree``
        (int, names the tree structure), ``device_bytes`` and ``headroom_bytes`` (int).

    Returns:
      The token of the advanced moments, and the updates with the gradients' shapes and dtypes.

    Raises:
      NotImplementedError: under `jax.vmap`.
      TypeError: under differentiation.
    """
    operands = guard(token, count, jnp.asarray(hyperparams), *grads)
    token, *updates = _spread(_ffi.update_call_p, operands, _ffi.NUM_SCALARS, **static)
    return token, updates


def guard(*operands: jax.Array) -> list[jax.Array]:
    """The operands as they are; refuses `jax.vmap` and differentiation with an explanation."""
    return _guard_p.bind(*operands)


def _spread(call_p, operands: Sequence[jax.Array], num_replicated: int, **static):
    mesh = jax.sharding.get_abstract_mesh()
    axis_types = set() if mesh.empty else set(mesh.axis_types)
    if axis_types == {AxisType.Manual}:
        return _call(call_p, operands, static)
    if axis_types == {AxisType.Explicit}:
        specs = [jax.typeof(grad).sharding.spec for grad in operands[num_replicated:]]
        return jax.shard_map(
            lambda *shards: _call(call_p, shards, static),
            in_specs=(*[P()] * num_replicated, *specs),
            out_specs=[P(), *specs],
            check_vma=False,
        )(*operands)
    with jax.disable_jit(False):  # a custom call has to be compiled, also under jax.disable_jit()
        return _automatic(call_p, num_replicated, tuple(sorted(static.items())))(*operands)


def _call(call_p, operands: Sequence[jax.Array], static: dict[str, Any]):
    """The custom call between barriers, which cost nothing at run time.

    XLA:GPU fuses slices of operands and results into a copy of a call. Where the call has a side
    effect, some versions leave the original in place as well, and it runs twice.
    """
    operands = jax.lax.optimization_barrier(tuple(operands))
    return jax.lax.optimization_barrier(call_p.bind(*operands, **static))


@functools.lru_cache(maxsize=256)
def _automatic(call_p, num_replicated: int, static: tuple[tuple[str, Any], ...]):
    def call(*operands):
        return _call(call_p, operands, dict(static))

    def partition(mesh, operands, results):
        del results
        everywhere = NamedSharding(mesh, P())
        shards = [operand.sharding for operand in operands[num_replicated:]]
        return mesh, call, [everywhere, *shards], (*[everywhere] * num_replicated, *shards)

    def sharding_rule(mesh, operand_types, result_types):
        del mesh, result_types
        # A factor of its own for every dimension; a result's are those of its operand.
        factors = (f"f{i}" for i in itertools.count())
        terms = [" ".join(next(factors) for _ in operand.shape) for operand in operand_types]
        return f"{', '.join(terms)} -> {', '.join([terms[0], *terms[num_replicated:]])}"

    function = custom_partitioning(call)
    function.def_partition(partition=partition, sharding_rule=sharding_rule)
    return jax.jit(function)


_guard_p = jax.extend.core.Primitive("paged_optax_guard")
_guard_p.multiple_results = True
_guard_p.def_impl(lambda *operands: operands)
_guard_p.def_abstract_eval(lambda *operands: operands)
mlir.register_lowering(_guard_p, lambda ctx, *operands: operands)


def _no_vmap(*args, **static) -> NoReturn:
    del args, static
    raise NotImplementedError(
        "a paged optimizer cannot be vmapped: its moments are one memory that every mapped copy"
        " would write to. Stack the models' parameters along a leading axis and update them as one"
        " tree, or step each model in a loop."
    )


def _no_gradient(*args, **static) -> NoReturn:
    del args, static
    raise TypeError(
        "a paged optimizer's update cannot be differentiated: its moments are outside JAX. Use"
        " optax.adamw to differentiate through a step, or jax.lax.stop_gradient on the gradients"
        " that go into it."
    )


batching.primitive_batchers[_guard_p] = _no_vmap
ad.primitive_jvps[_guard_p] = _no_gradient
