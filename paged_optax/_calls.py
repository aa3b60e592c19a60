"""The custom calls as functions of arrays: a token for a new state, an update, and its parts.

What runs on each device is a value that knows its attributes; `_partition` spreads it.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import _ffi
from ._job import is_shared, share_base
from ._non_finite import varying
from ._partition import Place, spread
from ._refusals import guard
from ._shards import Shards
from ._step import Part, Step


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


def open_step(
    step: Step, token: jax.Array, count: jax.Array, likes: Sequence[jax.Array]
) -> jax.Array:
    """Begins a step whose leaves are loaded and stored by `load` and `store`.

    Args:
      step: with the output ``"open"``.
      token: int32 of shape (2,).
      count: int32 of shape (), the number of steps already taken; `SKIP_STEP` skips this one.
      likes: for each leaf an array of its shape and sharding, which is not read.

    Returns:
      The token for `load` and `store`. If the step is refused or skipped it is the one that came
      in; then zeros are loaded, and nothing is stored.
    """
    likes = [jax.lax.stop_gradient(like) for like in likes]
    no_hyperparams = jnp.zeros(1, jnp.float32)  # one, since an empty operand can crash XLA (0.11.2)
    operands = guard(token, count, no_hyperparams, *likes)
    with jax.named_scope("paged_open"):
        (token,) = spread(_Update(step), operands, len(operands) - len(likes))
    return token


def load(
    part: Part, dtypes: Sequence[Any], token: jax.Array, likes: Sequence[jax.Array]
) -> tuple[jax.Array, list[jax.Array]]:
    """Some leaves of an open step.

    Args:
      part: which leaves.
      dtypes: of the results: float32, bfloat16 or float16.
      token: what `open_step`, or the last `load` or `store`, returned.
      likes: as for `open_step`.

    Returns:
      The token, and the leaves.
    """
    names = tuple(np.dtype(dtype).name for dtype in dtypes)
    likes = [jax.lax.stop_gradient(like) for like in likes]
    with jax.named_scope("paged_load"):
        token, *arrays = spread(_Load(part, names), guard(token, *likes), num_replicated=1)
    return token, arrays


def store(
    part: Part,
    token: jax.Array,
    count: jax.Array,
    arrays: Sequence[jax.Array],
    likes: Sequence[jax.Array],
) -> jax.Array:
    """Stores arrays in the place of some leaves of an open step.

    Args:
      part: which leaves, and whether the step ends with them.
      token: as for `load`.
      count: the number of steps already taken, for random bits.
      arrays: float32, bfloat16 or float16.
      likes: as for `open_step`; their shardings are those of the leaves.

    Returns:
      The token: of the new state, if the step ends.
    """
    likes = [jax.lax.stop_gradient(like) for like in likes]
    operands = guard(token, count, *arrays, *likes)
    end = len(operands) - len(likes)
    with jax.named_scope("paged_store"):
        (token,) = spread(_Store(part), operands[:end], 2, operands[end:])
    return token


def _vary_like(param: jax.Array, grad: jax.Array) -> jax.Array:
    """The parameter, which varies along the mesh axes that its gradient varies along."""
    axes = tuple(sorted(varying(grad) - varying(param)))
    return jax.lax.pcast(param, axes, to="varying") if axes else param


@dataclasses.dataclass(frozen=True)
class _Issue:
    takes_guides = returns_leaves = False

    def __call__(self, place: Place, *operands: jax.Array) -> tuple[jax.Array, ...]:
        shared = is_shared(place.num_devices)
        return _fence(functools.partial(_ffi.issue_call_p.bind, shared=shared), *operands)


@dataclasses.dataclass(frozen=True)
class _Update:
    step: Step

    @property
    def takes_guides(self) -> bool:
        return self.step.takes_params

    @property
    def returns_leaves(self) -> bool:
        return self.step.returns_leaves

    def __call__(self, place: Place, *operands: jax.Array) -> tuple[jax.Array, ...]:
        token, count, hyperparams, *leaves = operands
        step = dataclasses.replace(self.step, num_devices=place.num_devices, shards=place.shards)
        call = functools.partial(_ffi.update_call_p.bind, step=step)
        return _fence(call, token, count, hyperparams, _part(place), *leaves)


@dataclasses.dataclass(frozen=True)
class _Load:
    part: Part
    dtypes: tuple[str, ...]
    takes_guides = False
    returns_leaves = True

    def __call__(self, place: Place, *operands: jax.Array) -> tuple[jax.Array, ...]:
        part = dataclasses.replace(self.part, shards=place.shards)
        call = functools.partial(_ffi.load_call_p.bind, part=part, dtypes=self.dtypes)
        return _fence(call, *operands)


@dataclasses.dataclass(frozen=True)
class _Store:
    part: Part
    takes_guides = returns_leaves = False

    def __call__(self, place: Place, *operands: jax.Array) -> tuple[jax.Array, ...]:
        part = dataclasses.replace(self.part, shards=place.shards)
        return _fence(functools.partial(_ffi.store_call_p.bind, part=part), *operands)


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
