"""The global norm of a tree, in one pass over it, on one device or on many.

The custom call knows the types that gradients have here. Other leaves are left to XLA.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from . import _ffi
from ._non_finite import varying
from ._partition import even, sharding_terms
from ._refusals import guard
from ._validate import FLOATS


def global_norm(tree: Any) -> jax.Array:
    """The root of the sum of squares of all elements: `optax.tree.norm` in one pass.

    One call reads all leaves, with two launches on a GPU however many there are (of up to 1,300).
    On one device the result has the same bits on a CPU and on a GPU, whatever the number of
    threads. Two norms of the same gradients in a compiled program are one: to log the norm by which
    `clip_by_global_norm` clips costs nothing.

    Args:
      tree: arrays. Those that are float32, bfloat16 or float16 are read by one custom call, which
        computes in float32 and adds in float64. XLA sums the others.

    Returns:
      float32 of shape (): the norm over all shards of all leaves, on all devices. Inside of
      `jax.shard_map` and `jax.pmap` it is the norm of what the device has, as in optax. It is
      within two units in the last place of the exact one (on several devices four), if no element
      is below 1e-19 or from 2^62 on, where squares are subnormal or sums may be infinite.

    Raises:
      NotImplementedError: under `jax.vmap`.
      TypeError: under differentiation.

    Example:
      >>> import jax.numpy as jnp, paged_optax
      >>> print(paged_optax.global_norm({"w": jnp.full((2, 2), 2.0), "b": jnp.array([3.0])}))
      5.0
    """
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    ours = [leaf for leaf in leaves if leaf.dtype in FLOATS]
    others = [leaf for leaf in leaves if leaf.dtype not in FLOATS]
    norms = [_spread(guard(*ours))] if ours else []
    if others:
        norms.append(_by_xla(others))
    return _join(norms)


def _by_xla(leaves: Sequence[jax.Array]) -> jax.Array:
    """The norm of leaves of any type, over all their shards."""
    squares = [jnp.sum(jnp.square(jnp.abs(leaf).astype(jnp.float32))) for leaf in leaves]
    return jnp.sqrt(sum(squares, jnp.zeros([], jnp.float32)))


def _join(norms: Sequence[jax.Array]) -> jax.Array:
    """The norm of all that these are the norms of."""
    if len(norms) == 1:
        return norms[0]
    return jnp.sqrt(sum((norm * norm for norm in norms), jnp.zeros([], jnp.float32)))


def _spread(grads: Sequence[jax.Array]) -> jax.Array:
    """The norm over all devices. Mesh axes are treated by their type, as in `_partition`."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    explicit = frozenset(name for name, kind in kinds.items() if kind == AxisType.Explicit)
    with jax.disable_jit(False):  # a custom call has to be compiled, also under jax.disable_jit()
        if explicit:
            # Without `unreduced`: what is a sum over devices is summed before it is a gradient.
            specs = tuple(P(*jax.typeof(x).sharding.spec.partitions) for x in grads)
            return _explicit(explicit, specs)(*grads)
        if AxisType.Manual in kinds.values():
            sizes = zip(mesh.axis_sizes, mesh.axis_types, strict=True)
            if any(kind != AxisType.Manual and size > 1 for size, kind in sizes):
                return _by_xla(grads)
            return _call(grads)
        return _automatic()(*grads)


def _call(grads: Sequence[jax.Array]) -> jax.Array:
    """The norm of what the device has."""
    axes = frozenset().union(*(varying(grad) for grad in grads))
    like = jnp.zeros([], jnp.float32)
    like = jax.lax.pcast(like, tuple(sorted(axes)), to="varying") if axes else like
    return _ffi.norm_call_p.bind(like, *grads)


def _over_shards(
    grads: Sequence[jax.Array], specs: Sequence[P], norm: Any, axis_names: Sequence[str]
) -> jax.Array:
    """The norm of arrays of which each device has the shards that the specs say.

    Each leaf is summed over the axes that it is cut along, and so counts once.
    """
    groups: dict[tuple[str, ...], list[jax.Array]] = {}
    for grad, spec in zip(grads, specs, strict=True):
        cut = {name for part in spec for name in ((part,) if isinstance(part, str) else part or ())}
        groups.setdefault(tuple(name for name in axis_names if name in cut), []).append(grad)
    norms = []
    for axes, leaves in groups.items():
        local = norm(leaves)
        norms.append(jnp.sqrt(jax.lax.psum(local * local, axes)) if axes else local)
    return _join(norms)


@functools.lru_cache(maxsize=256)
def _explicit(explicit: frozenset[str], specs: tuple[P, ...]) -> Any:
    """Cuts along the explicit axes, and then calls `_spread` for the others."""

    @jax.jit  # shard_map over some axes of several has to be compiled
    def function(*grads):
        names = jax.sharding.get_abstract_mesh().axis_names
        return jax.shard_map(
            lambda *shards: _over_shards(shards, specs, _spread, names),
            in_specs=specs,
            out_specs=P(),
            axis_names=explicit,
            check_vma=False,
        )(*(jax.sharding.reshard(grad, spec) for grad, spec in zip(grads, specs, strict=True)))

    return function


@functools.cache
def _automatic() -> Any:
    """Leaves the cutting to the compiler."""

    def partition(mesh, operands, result):
        del result
        # The mesh has no manual axes, so shardings name axes.
        shardings: list[Any] = [even(mesh, x.sharding, x.shape) for x in operands]
        specs = [sharding.spec for sharding in shardings]
        return (
            mesh,
            lambda *grads: _over_shards(grads, specs, _call, mesh.axis_names),
            NamedSharding(mesh, P()),
            tuple(shardings),
        )

    def sharding_rule(mesh, operand_types, result_types):
        del mesh, result_types
        return f"{', '.join(sharding_terms(operand_types))} -> "

    function = custom_partitioning(lambda *grads: _call(grads))
    function.def_partition(partition=partition, sharding_rule=sharding_rule)
    return jax.jit(function)
