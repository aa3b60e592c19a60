"""The two custom calls as functions of arrays: a token for a new state, and an update.

What runs on each device is a value that knows its attributes; `_partition` spreads it.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from . import _ffi
from ._job import is_shared, share_base
from ._non_finite import varying
from ._partition import Place, spread
from ._refusals import guard
from ._shards import Shards
from ._step import Step


def issue(seed: jax.typing.ArrayLike) -> jax.Array:
    """Makes a token for a new state.

    Args:
      seed: int32 of shape (2,), any value. Two calls in one program must differ in it, or the
        compiler may merge them.

    Returns:
      int32 of shape (2,): a handle that no other state has, and version 0.
    """
    share_base()
    (token,) = spread(_Issue(), (jnp.asarray(seed),), num_replicated=1)
    return token


def update(
    step: Step,
    token: jax.Array,
    count: jax.Array,
    hyperparams: jax.typing.ArrayLike,
    grads: Sequence[jax.Array],
    params: Sequence[jax.Array],
) -> tuple[jax.Array, list[jax.Array]]:
    """Advances the moments of `token` by one step.

    Args:
      step: what the call is told of this step.
      token: int32 of shape (2,).
      count: int32 of shape (), the number of steps already taken; -1 skips this one.
      hyperparams: float32: those of the rule, and then learning rate and weight decay if
        `step.takes_params`.
      grads: gradients, in tree order.
      params: their parameters, or nothing. Unless the step takes them, only their shardings
        matter: where the compiler decides, gradients are cut as their parameters are.

    Returns:
      The token of the advanced moments; and the directions or updates, which have the gradients'
      dtypes, or the new parameters.

    Raises:
      NotImplementedError: under `jax.vmap`.
      TypeError: under differentiation.
    """
    if not step.takes_params:  # then the step does not depend on their values
        params = [jax.lax.stop_gradient(param) for param in params]
    elif step.replaced.stop is None:
        params = [_vary_like(param, grad) for param, grad in zip(params, grads, strict=True)]
    operands = guard(token, count, jnp.asarray(hyperparams), *grads, *params)
    end = len(operands) - len(params)
    with jax.named_scope(f"paged_{step.rule_name}"):  # what profilers call it
        token, *results = spread(_Update(step), operands[:end], end - len(grads), operands[end:])
    return token, results


def _vary_like(param: jax.Array, grad: jax.Array) -> jax.Array:
    """The parameter, which varies along the mesh axes that its gradient varies along."""
    axes = tuple(sorted(varying(grad) - varying(param)))
    return jax.lax.pcast(param, axes, to="varying") if axes else param


@dataclasses.dataclass(frozen=True)
class _Issue:
    takes_guides = False

    def __call__(self, place: Place, *operands: jax.Array) -> tuple[jax.Array, ...]:
        shared = is_shared(place.num_devices)
        return _fence(functools.partial(_ffi.issue_call_p.bind, shared=shared), *operands)


@dataclasses.dataclass(frozen=True)
class _Update:
    step: Step

    @property
    def takes_guides(self) -> bool:
        return self.step.takes_params

    def __call__(self, place: Place, *operands: jax.Array) -> tuple[jax.Array, ...]:
        token, count, hyperparams, *leaves = operands
        step = dataclasses.replace(self.step, num_devices=place.num_devices, shards=place.shards)
        call = functools.partial(_ffi.update_call_p.bind, step=step)
        return _fence(call, token, count, hyperparams, _part(place), *leaves)


def _part(place: Place) -> jax.Array:
    """Which parts of the leaves the device has; its position if that is not known. int32 ()."""
    if place.num_devices == 1:
        return jnp.zeros([], jnp.int32)
    position = _ffi.position_p.bind()
    return Shards.decode(place.shards).part(position) if place.shards else position


def _fence(call: Any, *operands: jax.Array) -> tuple[jax.Array, ...]:
    """A custom call between barriers, which cost nothing at run time.

    XLA:GPU fuses slices of operands and results into a copy of a call. Where the call has a side
    effect, some versions leave the original in place as well, and it runs twice.
    """
    return tuple(_barrier(call(*_barrier(operands))))


def _barrier(arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """An optimization barrier for each kind of array.

    In jax 0.10 the results of one barrier all vary along the axes that any operand varies along, so
    that `jax.shard_map` would not see that a token is the same on all devices.
    """
    kinds: dict[Any, list[int]] = {}
    for i, array in enumerate(arrays):
        kinds.setdefault(getattr(jax.typeof(array), "manual_axis_type", None), []).append(i)
    results = list(arrays)
    for indices in kinds.values():
        fenced = jax.lax.optimization_barrier([arrays[i] for i in indices])
        for i, array in zip(indices, fenced, strict=True):
            results[i] = array
    return results
