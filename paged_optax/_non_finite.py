"""Whether gradients are finite, the same answer on all devices that take part."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import AxisType


def count_bad(grads: Sequence[jax.Array], reduce: Callable[..., jax.Array]) -> jax.Array:
    """Gradient elements that are not finite or have no finite square, on all devices: int32 ().

    With ``reduce=jnp.any`` a leaf counts as one.
    """
    totals: dict[tuple[str, ...], jax.Array] = {}  # by the manual axes that gradients vary along
    for grad in grads:
        limit = jnp.inf if grad.dtype == jnp.float16 else 2.0**64
        count = reduce(~(jnp.abs(grad) < limit)).astype(jnp.int32)
        axes = tuple(sorted(_varying(count)))
        totals[axes] = add_counts(totals[axes], count) if axes in totals else count
    if not any(totals):  # jax.shard_map does not tell: they may vary along all
        mesh = jax.sharding.get_abstract_mesh()
        kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
        manual = tuple(name for name, kind in kinds if kind == AxisType.Manual)
        totals = {manual: totals[()]} if totals else {}
    result = jnp.zeros([], jnp.int32)
    for axes, total in totals.items():
        result = add_counts(result, jax.lax.psum(total, axes) if axes else total)
    return result


def _varying(x: jax.Array) -> frozenset[str]:
    """The manual axes that a value is known to vary along; none without ``check_vma``."""
    return getattr(getattr(jax.typeof(x), "manual_axis_type", None), "varying", frozenset())


def add_counts(x: jax.Array, y: jax.Array) -> jax.Array:
    """The sum of two counters, which stop at the largest int32."""
    largest = jnp.iinfo(jnp.int32).max
    return jnp.where(x > largest - y, largest, x + y)
