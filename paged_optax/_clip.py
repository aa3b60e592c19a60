"""Clipping by the global norm, which a paged optimizer does while it steps.

In a chain, one link only sees the arrays that the one before it returned. So `clip_by_global_norm`
returns scaled gradients, as optax's does, and notes of which gradients they were made. A paged
optimizer that gets these very arrays takes the gradients themselves and their norm instead, and
nobody reads the scaled ones: in a compiled program they are never made. If a transformation in
between changed them, they are other arrays, and what arrives is used as it is.
"""

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from ._non_finite import varying
from ._norm import global_norm
from ._validate import check_range


class _Origin(NamedTuple):
    """Of what a scaled gradient was made: functions that return it, or None if it is gone."""

    scaled: weakref.ref[Any]  # the gradient whose origin this is
    grad: Callable[[], jax.Array | None]
    norm: Callable[[], jax.Array | None]
    max_norm: Callable[[], jax.Array | None]


_origins: dict[int, _Origin] = {}  # by id of the scaled gradient, while that is alive


def clip_by_global_norm(max_norm: jax.typing.ArrayLike) -> optax.GradientTransformation:
    r"""Scales gradients down to a global norm: `optax.clip_by_global_norm` without rewriting them.

    With the norm :math:`n` of all gradients, as `global_norm` computes it,

    .. math::

      g \leftarrow g \cdot \begin{cases} 1 & n < n_\max \\ n_\max / n & \text{otherwise}\end{cases}

    A paged optimizer that comes next in the chain multiplies gradients while it steps. XLA then
    writes no scaled gradients, which saves their memory, and the time to write and read them.
    Wrappers such as `optax.masked`, `optax.partition`, `optax.inject_hyperparams`, `MultiSteps` and
    `skip_non_finite` may be around the optimizer or around both. `MultiSteps` around the optimizer
    alone, and ``skip_non_finite(..., "element")``, cost what they do with optax's function. Every
    other transformation sees scaled gradients, as with that one.

    Args:
      max_norm: the largest norm, infinite for none; a float or a traced scalar.

    Returns:
      An `optax.GradientTransformation` without a state, as optax's. Gradients may have any dtype
      and shape; they keep them. Those of integers, which optax's function refuses with a
      `TypeError`, are rounded towards zero.

    Raises:
      ValueError: for a negative number.
      TypeError: for something that is no number.

    Example:
      >>> import jax, jax.numpy as jnp, optax, paged_optax
      >>> clip = paged_optax.clip_by_global_norm(1.0)
      >>> tx = optax.chain(clip, paged_optax.paged_sgd8bit(0.5, momentum=0.9))
      >>> params = {"w": jnp.zeros(2), "b": jnp.zeros(1)}
      >>> grads = {"w": jnp.array([3.0, 0.0]), "b": jnp.array([4.0])}
      >>> updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
      >>> print(updates["w"].round(3) + 0.0, updates["b"].round(3))
      [-0.3  0. ] [-0.4]

    References:
      Pascanu et al., `On the difficulty of training Recurrent Neural Networks
      <https://arxiv.org/abs/1211.5063>`_, 2012

    .. note::
      Deviations from `optax.clip_by_global_norm`: the norm is more exact, and a scale is computed
      before it is multiplied, in float32. If optax's norm is wrong by a relative error d, gradients
      of float32 differ by at most d + 3e-7 of themselves. Those of 16 bits are not rounded on their
      way into a paged optimizer.
    """
    if not _is_infinite(max_norm):
        check_range("max_norm", max_norm)

    def update_fn(updates, state, params=None):
        del params
        leaves, treedef = jax.tree.flatten(updates)
        if not leaves:
            return updates, state
        grads = [jnp.asarray(leaf) for leaf in leaves]
        limits = global_norm(grads), jnp.asarray(max_norm, jnp.float32)
        return jax.tree.unflatten(treedef, [_clipped(grad, *limits) for grad in grads]), state

    return optax.GradientTransformation(optax.init_empty_state, update_fn)


def unclipped(
    updates: Any, grads: list[jax.Array]
) -> tuple[list[jax.Array], tuple[jax.Array, ...]]:
    """What a paged optimizer steps with.

    Args:
      updates: the tree that it got.
      grads: its leaves as arrays.

    Returns:
      Gradients before they were clipped, and their norm with the largest that is allowed; or
      `grads` and nothing, unless all leaves were clipped together.
    """
    found: list[jax.Array] = []
    limits: tuple[jax.Array, ...] = ()
    for leaf in jax.tree.leaves(updates):
        origin = _origins.get(id(leaf))
        if origin is None:
            return grads, ()
        grad, norm, max_norm = origin.grad(), origin.norm(), origin.max_norm()
        if grad is None or norm is None or max_norm is None or _is_donated(grad):
            return grads, ()
        # Else devices that have one gradient in common would scale it each in its own way.
        if (limits and norm is not limits[0]) or not varying(norm) <= varying(grad):
            return grads, ()
        found.append(grad)
        limits = norm, max_norm
    return found, limits


def _clipped(grad: jax.Array, norm: jax.Array, max_norm: jax.Array) -> jax.Array:
    """The gradient, scaled; its origin is known as long as it lives."""
    is_wide = jnp.issubdtype(grad.dtype, jnp.inexact) and grad.dtype.itemsize >= 4
    dtype = grad.dtype if is_wide else jnp.float32
    scaled = (grad.astype(dtype) * (max_norm / norm).astype(dtype)).astype(grad.dtype)
    scaled = jnp.where(norm < max_norm, grad, scaled)
    key = id(scaled)
    reference = weakref.ref(scaled, lambda _: _origins.pop(key, None))
    _origins[key] = _Origin(reference, *map(_held, (grad, norm, max_norm)))
    return scaled


def _held(array: jax.Array) -> Callable[[], jax.Array | None]:
    """A function that returns the array, and keeps it unless it is traced.

    A traced one leads to the equations of its trace, and so to the scaled gradient, which then
    would never be freed. The same equations keep both for as long as the trace goes on.
    """
    return weakref.ref(array) if isinstance(array, Tracer) else lambda: array


def _is_infinite(max_norm: Any) -> bool:
    """Whether nothing is to be clipped."""
    return isinstance(max_norm, float | np.floating) and max_norm == np.inf


def _is_donated(grad: jax.Array) -> bool:
    """Whether someone has donated the gradient since."""
    return not isinstance(grad, Tracer) and grad.is_deleted()
