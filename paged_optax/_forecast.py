"""What an optimizer would keep, from shapes alone. Its transformation is traced, and nothing runs.

The trace has the custom calls that a training step would make, with all that they are told. So the
extension can lay out the moments as the first step would, whatever chains, masks, labels or
wrappers are around the optimizer.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import optax

from . import _ext
from ._ffi import NUM_SCALARS, update_call_p
from ._state import is_paged
from ._step import Step
from ._tables import PARAM_ROUNDINGS


@dataclasses.dataclass(frozen=True)
class Kept:
    """What an optimizer keeps between steps, on each device.

    Attributes:
      in_xla: bytes of its state that are arrays of JAX.
      states: its paged states, as `_ext.forecast` takes them.
    """

    in_xla: int
    states: tuple[dict[str, Any], ...]

    def forecast(self, free_bytes: int) -> dict[str, int]:
        """Bytes of all moments on a device with so many bytes free; see forecast.h."""
        parts = _ext.forecast(list(self.states), max(-(2**62), min(free_bytes, 2**62)))
        names = ("on_cpu", "on_gpu", "resident", "host_traffic")
        return {name: sum(part[name] for part in parts) for name in names}


def kept_by(tx: optax.GradientTransformation, params: Any) -> Kept:
    """What a transformation would keep for parameters.

    Args:
      tx: any transformation.
      params: arrays or `jax.ShapeDtypeStruct`s; those with a sharding count with their part on a
        device.

    Raises:
      ValueError: if the paged states cannot be told apart.
    """
    whole = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    local = local_shapes(params)
    state, calls = _trace(tx, whole)
    if jax.tree.leaves(whole) == jax.tree.leaves(local):
        local_calls = calls
    else:  # formats follow from whole leaves, and sizes from the parts
        state, local_calls = _trace(tx, local)
    if len(calls) != len(local_calls):
        raise ValueError(
            "the optimizer chooses leaves by their sizes, and chooses others for one device's part"
            " of them; pass parameters without shardings, or choose by names"
        )
    leaves = jax.tree.leaves(state)
    states = [
        _describe(*call, shapes) for call, (_, shapes) in zip(calls, local_calls, strict=True)
    ]
    return Kept(sum(map(num_bytes, leaves)), tuple(states))


def local_shapes(tree: Any) -> Any:
    """Shapes of the parts of arrays that one device has."""

    def shape(leaf):
        sharding = getattr(leaf, "sharding", None)
        part = leaf.shape if sharding is None else sharding.shard_shape(tuple(leaf.shape))
        return jax.ShapeDtypeStruct(part, leaf.dtype)

    return jax.tree.map(shape, tree)


def num_bytes(leaf: Any) -> int:
    """Bytes of an array, from its shape."""
    return int(np.prod(leaf.shape, dtype=np.int64)) * np.dtype(leaf.dtype).itemsize


# The attributes of a call, and the shapes and types of its gradients and parameters.
_Call = tuple[Step, tuple[Any, ...]]


def _trace(tx: optax.GradientTransformation, params: Any) -> tuple[Any, list[_Call]]:
    """The state of a transformation, and its custom calls: one for each paged state."""
    state = jax.eval_shape(tx.init, params)
    num_states = sum(map(is_paged, jax.tree.leaves(state, is_leaf=is_paged)))
    if not num_states:
        return state, []
    program = jax.make_jaxpr(tx.update)(params, state, params)
    calls = list(_calls_in(program.jaxpr))
    if len(calls) > num_states:  # the branches of a jax.lax.cond update the same state
        calls = list(dict.fromkeys(calls))
    if len(calls) > num_states:
        raise ValueError(
            f"the optimizer has {num_states} paged states and {len(calls)} kinds of updates; which"
            " belong together cannot be told from shapes. Plan for its parts one by one."
        )
    return state, calls


def _calls_in(jaxpr: Any) -> Iterator[_Call]:
    """The updates in a program and in all programs inside it."""
    for eqn in jaxpr.eqns:
        if eqn.primitive is update_call_p:
            avals = tuple(
                jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype) for x in eqn.invars[NUM_SCALARS:]
            )
            yield eqn.params["step"], avals
            continue
        for value in jax.tree.leaves(list(eqn.params.values())):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _calls_in(inner)


def _describe(step: Step, leaves: Sequence[Any], local_leaves: Sequence[Any]) -> dict[str, Any]:
    num_leaves = len(step.formats)
    compensated = PARAM_ROUNDINGS[step.param_rounding] == "compensated"
    params = leaves[num_leaves:]  # none, unless the step takes them
    return {
        "rule": step.rule,
        "formats": step.formats,
        "shapes": [leaf.shape for leaf in local_leaves[:num_leaves]],
        "replay": step.replay,
        "has_residuals": compensated and any(leaf.dtype != np.float32 for leaf in params),
        "device_bytes": step.device_bytes,
        "headroom_bytes": step.headroom_bytes,
    }
