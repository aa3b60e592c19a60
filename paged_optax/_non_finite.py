"""Whether gradients are finite: the same answer on all devices that take part."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

_LARGEST = 2**31 - 1


def is_bad(grad: jax.Array) -> jax.Array:
    """Where a gradient has no finite square: a bool for each element."""
    if not jnp.issubdtype(grad.dtype, jnp.inexact):
        return jnp.zeros(grad.shape, bool)
    limit = jnp.inf if grad.dtype == jnp.float16 else 2.0**64
    return ~(jnp.abs(grad) < limit)


def count_bad(grads: Sequence[jax.Array], reduce: Callable[..., jax.Array]) -> jax.Array:
    """How many gradient elements are bad, see `is_bad`, on all devices: int32 ().

    With ``reduce=jnp.any`` a leaf counts as one, with `count_elements` each element counts. Where
    JAX does not tell whether gradients are the same on several devices (`jax.pmap`,
    `jax.shard_map`), each device's elements count.
    """
    totals: dict[tuple[str, ...], jax.Array] = {}  # by the manual axes that gradients vary along
    for grad in grads:
        count = reduce(is_bad(grad)).astype(jnp.int32)
        axes = tuple(sorted(varying(count)))
        totals[axes] = add_counts(totals[axes], count) if axes in totals else count
    if not any(totals):  # jax.shard_map does not tell: gradients may vary along all axes
        mesh = jax.sharding.get_abstract_mesh()
        kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
        manual = tuple(name for name, kind in kinds if kind == AxisType.Manual)
        totals = {manual: totals[()]} if totals else {}
    result = jnp.zeros([], jnp.int32)
    for axes, total in totals.items():
        if axes:
            about = jax.lax.psum(total.astype(jnp.float32), axes)
            total = _stop(jax.lax.psum(total, axes), about)
        result = add_counts(result, total)
    return result


def count_elements(bad: jax.Array) -> jax.Array:
    """How many elements are True: int32 (); from 2^30 on, the largest int32."""
    rows = jnp.sum(jnp.atleast_1d(bad), axis=-1, dtype=jnp.int32)
    return _stop(jnp.sum(rows, dtype=jnp.int32), jnp.sum(rows.astype(jnp.float32)))


def _stop(count: jax.Array, about: jax.Array) -> jax.Array:
    """The count, or the largest int32 if it may have wrapped; `about` is the count as a float."""
    return jnp.where(about < 2.0**30, count, _LARGEST)


def varying(x: jax.Array) -> frozenset[str]:
    """The manual axes that a value is known to vary along; none without ``check_vma``."""
    return getattr(getattr(jax.typeof(x), "manual_axis_type", None), "varying", frozenset())


def add_counts(x: jax.Array, y: jax.Array) -> jax.Array:
    """The sum of two counts, at most the largest int32."""
    return jnp.where(x > _LARGEST - y, _LARGEST, x + y)
