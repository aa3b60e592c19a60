"""The states of paged optimizers, and the tokens in them.

Moments live outside JAX and change in place. A state holds a token for them: a handle, which says
in which memory they are, and a version, which says which contents of it the state means. Every
executed update makes a new version. A token that is not the newest is recognised and refused, and
the moments stay as they were. `xla_ffi/README.md` gives the full contract.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from . import _calls, _ext
from ._ffi import TOKEN_SHAPE
from ._local import local_token
from ._refused import is_entry, stop_if_refused
from ._watch import check_ends, note_use, watch

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Token:
    """The token of a state: a node of its own in the tree, so that what uses it can tell."""

    value: Any  # int32 (2,): handle of the moments, version of their contents

    def __post_init__(self) -> None:
        watch(self.value)

    def __copy__(self) -> "Token":
        return self  # a deep copy is a second state: see `_carriers`


def _flatten(token: Token) -> tuple[tuple[Any], None]:
    stop_if_refused(token.value)
    if _ext.num_unused() and is_entry():
        note_use(token.value)
    return (token.value,), None


def _flatten_with_key(token: Token) -> tuple[tuple[tuple[Any, Any]], None]:
    (value,), _ = _flatten(token)
    return ((jax.tree_util.GetAttrKey("value"), value),), None


jax.tree_util.register_pytree_with_keys(
    Token, _flatten_with_key, lambda _, values: Token(*values), _flatten
)


class PagedState(NamedTuple):
    """A few integers, whatever the size of the model.

    Attributes:
      count: int32 of shape (), the number of updates so far.
      token: its `value`, int32 of shape (2,), says which moments belong to the state: their handle,
        and the version of their contents.
    """

    # `count` hides tuple.count, as in optax's own states.
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    token: Any  # a `Token`; its array in what `find_states` returns


_state_types: list[type] = []


def paged_state(cls: type[T]) -> type[T]:
    """Registers a class of states, which is a `PagedState`, and says so in its docstring."""
    _state_types.append(cls)
    cls.__doc__ = f"{cls.__doc__}\n\n    {PagedState.__doc__}"
    return cls


def is_paged(node: Any) -> TypeGuard[PagedState]:
    """Whether a node of an optimizer state is the state of a paged optimizer."""
    return isinstance(node, tuple(_state_types))


_seeds = itertools.count()


def new_token(num_leaves: int) -> Token:
    """Token of a new state. Without leaves there is nothing to store, so no handle is issued."""
    if num_leaves == 0:
        return Token(jnp.zeros(TOKEN_SHAPE, jnp.int32))
    return Token(_calls.issue(np.array([next(_seeds) % 2**31, 0], np.int32)))


def make_beside(params: Sequence[Any], make: Callable[[], T]) -> T:
    """A fresh state on the mesh of the parameters, if they are on one: the same on every device.

    A program that restores a state, or puts it where the parameters are, finds the mesh in it.
    """
    for leaf in params:
        sharding = None if isinstance(leaf, Tracer) else getattr(leaf, "sharding", None)
        if not isinstance(sharding, NamedSharding) or not isinstance(sharding.mesh, Mesh):
            continue
        if sharding.mesh.size == 1:
            continue
        everywhere = NamedSharding(sharding.mesh, P())
        if sharding.is_fully_addressable:
            return jax.device_put(make(), everywhere)
        # One program of all processes, so that they get the same handle.
        return jax.jit(make, out_shardings=everywhere)()
    return make()


def check_state(state: Any, kind: type) -> jax.Array:
    """The token of a state; refuses what is not one of this kind, as init or update returned it."""
    if not isinstance(state, kind):
        raise TypeError(
            f"the optimizer state is a {type(state).__name__}, not one that this optimizer's init"
            " returned. Moments of another optimizer, or of one with another param_rounding or"
            " non_finite, cannot be taken over: start with init(params)."
        )
    token = getattr(state.token, "value", state.token)
    for name, value, wanted, shape in (
        ("token", token, "int32[2]", TOKEN_SHAPE),
        ("count", state.count, "int32[]", ()),
    ):
        _check_array(name, wanted, value)
        if value.dtype != jnp.int32 or value.shape != shape:
            raise ValueError(
                f"the optimizer state's {name} is {value.dtype}{list(value.shape)}, and must be"
                f" {wanted} as init returned it; was the whole state cast, stacked or mapped over?"
            )
    return token


def _check_array(name: str, wanted: str, value: Any) -> None:
    """Refuses what is no array of this machine, which came from a file or from another one."""

    def describe() -> str:  # reads the value, so only for an error
        return (
            f"the optimizer state's {name} is {value!r}, and must be {wanted} as init returned it"
        )

    if not hasattr(value, "dtype"):
        raise TypeError(
            f"{describe()}: an array. Was the state read from JSON or the like? Its token names"
            " moments of the process that made it: start with init(params)."
        )
    if not np.dtype(value.dtype).isnative:
        raise ValueError(
            f"{describe()}: in the byte order of this machine. Convert the state:"
            " jax.tree.map(lambda leaf: leaf.astype(leaf.dtype.newbyteorder('=')), opt_state)"
        )


def find_states(opt_state: Any) -> list[PagedState]:
    """The paged states inside any optimizer state, in tree order."""
    opt_state = getattr(opt_state, "opt_state", opt_state)  # nnx.Optimizer, TrainState
    states = _states_in(opt_state)
    if not states:
        raise no_states(opt_state)
    for state in states:
        _check_token(state.token)
    return states


def no_states(opt_state: Any) -> ValueError:
    """What to raise where there is no paged state."""
    return ValueError(
        f"there is no paged optimizer state in this {type(opt_state).__name__}; pass what the"
        " optimizer's init or update returned (not the parameters)"
    )


def has_states(opt_state: Any) -> bool:
    """Whether there is a paged state inside an optimizer state."""
    return bool(_states_in(opt_state))


def is_state(node: Any) -> bool:
    """Whether a node is a paged state, or the mapping that nnx.split or a state dict made of it."""
    return as_state(node) is not None


def _states_in(opt_state: Any) -> list[PagedState]:
    nodes = jax.tree.leaves(opt_state, is_leaf=is_state)
    return [state for state in map(as_state, nodes) if state is not None]


def as_state(node: Any) -> PagedState | None:
    """The paged state that a node is, also where nnx.split or a state dict made a mapping of it."""
    if isinstance(node, Mapping) and set(node) == set(PagedState._fields):
        state = PagedState(**node)
    elif is_paged(node):
        state = node
    else:
        return None
    token = without_moments(state.token)
    # A Token is not taken apart: who asks about a refused state wants to mend it.
    leaves = jax.tree.leaves(token.value if isinstance(token, Token) else token)
    if len(leaves) == 1 and getattr(leaves[0], "dtype", None) == jnp.int32:
        return state._replace(token=leaves[0])
    if isinstance(node, Mapping):
        return None  # parameters of these names
    return state._replace(token=getattr(state.token, "value", state.token))


def without_moments(token: Any) -> Any:
    """The token of a state; in a state dict of flax, the moments are next to it."""
    return {"value": token["value"]} if isinstance(token, Mapping) and "value" in token else token


def _check_token(token: Any) -> None:
    if isinstance(token, jax.ShapeDtypeStruct):
        raise TypeError(
            "the optimizer state has shapes and no values (from jax.eval_shape?); pass one that"
            " init or update returned"
        )
    _check_array("token", "int32[2]", token)
    dtype, shape = token.dtype, np.shape(token)
    if dtype != jnp.int32 or shape != TOKEN_SHAPE:
        raise ValueError(
            f"the optimizer state's token is {dtype}{list(shape)}, and must be int32[2] as init"
            " returned it; of states that were stacked (jax.pmap, jax.lax.scan) pass one:"
            " jax.tree.map(lambda leaf: leaf[0], opt_state)"
        )


def read_anyway(state: PagedState) -> tuple[int, int]:
    """`read_token`, of the first device if they do not agree: for what ends or mends a state."""
    token = jax.tree.leaves(state.token)[0]
    if not isinstance(token, jax.Array) or isinstance(token, Tracer):
        return read_token(state)
    check_ends(token)
    with contextlib.suppress(RuntimeError):  # the program failed
        token.block_until_ready()
    found = local_token(token)
    if found is None:
        return read_token(state)  # which says what to do
    return int(found[0]), int(found[1])


def read_token(state: PagedState) -> tuple[int, int]:
    """Handle and version of a state, once the update that made it is done."""
    return read_handle(state.token)


def read_handle(token: Any) -> tuple[int, int]:
    """`read_token`, of the array of a token."""
    token = jnp.asarray(token)
    if isinstance(token, Tracer):
        raise TypeError(
            "the optimizer state is being traced (inside jax.jit or another transformation); call"
            " this outside of it"
        )
    check_ends(token)
    token.block_until_ready()  # for the update that made it, on every device and not just the first
    if not token.is_fully_replicated:  # cut by a rule for all leaves of a state
        if not token.is_fully_addressable:
            raise ValueError(
                f"the optimizer state's token is cut over processes ({token.sharding}), so that"
                " this one has only part of it. Replicate what has fewer elements than devices: in"
                " the rule for the state's leaves, `P() if leaf.size <= 2 else ...`"
            )
        token = jax.device_put(token, jax.sharding.SingleDeviceSharding(jax.local_devices()[0]))
    copies = {tuple(np.asarray(shard.data).tolist()) for shard in token.addressable_shards}
    if len(copies) > 1:
        raise RuntimeError(
            f"the devices disagree about this optimizer state ({sorted(copies)}): a step was"
            " refused on some of them and ran on others. Make a new state with init(params)."
        )
    ((handle, version),) = copies
    return handle, version


def read_count(count: Any) -> int:
    """The value of a count, which is the same on all devices."""
    (leaf,) = jax.tree.leaves(count)  # opens an nnx.Variable
    shards = getattr(leaf, "addressable_shards", None)
    return int(np.asarray(shards[0].data if shards else leaf))
