"""Reading moments: from every device, out of their format, into the tree of the parameters."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from . import _ext, _names
from . import _reference as reference
from ._contents import BLOCK, Contents, Field
from ._log import named
from ._refused import tell_refusals
from ._shards import Shards
from ._state import PagedState, find_states, read_token
from ._tables import RULES, rule_number
from ._transfer import find_staged

# The values of one leaf's states, or those of all leaves as trees, by the names of the states.
Values = dict[str, Any]


class Moments(NamedTuple):
    """Dequantized moments, in the tree of the parameters: float32 NumPy arrays.

    The names are those of optax's own states. A moment that no optimizer of the state has is None.
    If some of several optimizers have it, the leaves of the others are `optax.MaskedNode`.

    Attributes:
      mu: running mean of the gradients: Adam, Lion, Muon, centered RMSprop.
      nu: running mean of their squares: Adam, AdEMAMix, RMSprop.
      trace: momentum: SGD, LARS, RMSprop with momentum.
      ema: moving average: Signum.
      m1: the fast mean of AdEMAMix.
      m2: its slow mean.
      sum_of_squares: of Adagrad.
      state: the arrays that `paged` keeps, in the tree of the wrapped state.
    """

    mu: Any = None
    nu: Any = None
    trace: Any = None
    ema: Any = None
    m1: Any = None
    m2: Any = None
    sum_of_squares: Any = None
    state: Any = None


def moments(opt_state: Any, *, gather: bool = False) -> Moments:
    """Reads the moments of an optimizer state.

    Waits for the updates under way. Meant for inspection and for tests: the result takes 8 bytes
    per parameter, four times as much as what is stored.

    Args:
      opt_state: any optax state, nnx.Optimizer or TrainState with a paged state in it.
      gather: for a state on devices of several processes (`jax.distributed`), whether to collect
        the shards of all of them. Every process of the job must then make this call, because each
        waits for all others.

    Returns:
      A `Moments` of float32 NumPy arrays in the tree of the updates. States for disjoint parts of
      one tree (``optax.partition``, ``optax.masked``) are merged.

    Raises:
      ValueError: if there is no paged state, or several for the same parameters.
      RuntimeError: if the state is not the newest one, was released, or was never updated; without
        `gather`, if other processes have a part of it.
      NotImplementedError: if it is not known which part of the parameters each device has.

    Example:
      >>> import jax, jax.numpy as jnp, paged_optax
      >>> tx = paged_optax.scale_by_paged_adam8bit()
      >>> params = {"w": jnp.ones((64, 64))}
      >>> updates, state = tx.update({"w": jnp.full((64, 64), 2.0)}, tx.init(params))
      >>> print(paged_optax.moments(state).mu["w"][0, 0].round(4))
      0.2
    """
    with named("moments"):
        states = [_read_state(state, gather) for state in find_states(opt_state)]
    try:
        return Moments(**{name: _merge_all(states, name) for name in Moments._fields})
    except _Overlap:
        raise ValueError(
            f"found {len(states)} paged states for the same parameters; pass one of them, for"
            " example opt_state[0]"
        ) from None


def _merge_all(states: list[Values], name: str) -> Any:
    """The tree of one moment, of all states that have it."""
    trees = [state[name] for state in states if name in state]
    return functools.reduce(_merge, trees) if trees else None


class _Overlap(Exception):
    """Two states have moments of the same parameter."""


def _merge(one: Any, other: Any) -> Any:
    """One tree out of two; for each leaf or subtree, one of them must have a MaskedNode."""
    if isinstance(one, optax.MaskedNode):
        return other
    if isinstance(other, optax.MaskedNode):
        return one
    if isinstance(one, np.ndarray) or isinstance(other, np.ndarray):
        raise _Overlap
    ones, treedef = jax.tree.flatten(one, is_leaf=lambda node: node is not one)
    others = jax.tree.leaves(other, is_leaf=lambda node: node is not other)
    if len(ones) != len(others):
        raise _Overlap
    return jax.tree.unflatten(treedef, [_merge(*pair) for pair in zip(ones, others, strict=True)])


def _read_state(state: PagedState, gather: bool) -> Values:
    """The moments of one state: a tree for each that its rule has."""
    handle, version = read_token(state)
    tell_refusals()
    staged = find_staged(handle, version)
    if staged is not None:
        return _to_trees(staged.tree, _decode(staged))
    reports = _ext.describe(handle, version)
    # With replay=True its first step may have run and been dropped.
    if version == 0 or not any(report["version"] for report in reports):
        raise RuntimeError(
            "this optimizer state was never updated: its moments are zero, and not stored"
        )
    first = reports[0]
    if first["num_devices"] == 1:
        leaves = _read_device(first, handle, version)
    else:
        mesh, shards = _mesh(state, reports)
        if len(reports) < mesh.size and not gather:
            raise RuntimeError(
                f"{mesh.size - len(reports)} of the {mesh.size} devices with moments of this state"
                " belong to other processes; to collect theirs, call"
                " moments(opt_state, gather=True) in every process"
            )
        leaves = _assemble(mesh, shards, reports, handle, version)
    return _to_trees(first["tree"], leaves)


def _to_trees(tree: int, leaves: list[Values]) -> Values:
    """The values of all leaves as trees."""
    if tree not in _names.trees:
        raise RuntimeError(
            "the tree of the parameters is unknown: the update was not traced in this process, or"
            f" before those of {_names.MAX_TREES} other models. Trace it again (an eager update"
            " does)."
        )
    treedef = _names.trees[tree]
    names = leaves[0]  # a state without leaves was never updated
    return {name: jax.tree.unflatten(treedef, [leaf[name] for leaf in leaves]) for name in names}


def _decode(contents: Contents) -> list[Values]:
    """The values of every leaf of a state that was restored and not updated yet."""
    return [decode_leaf(contents, i) for i in range(len(contents.leaves))]


def decode_leaf(contents: Contents, i: int) -> Values:
    """The values of a leaf whose boxes are all there, in float32."""
    leaf, states = contents.leaves[i], RULES[rule_number(contents.rule)]["states"]
    signed = [role == "signed" for _, role in states]
    values = {name: np.zeros(leaf.shape, np.float32) for name, _ in states}
    fields = [field for field in contents.fields(leaf) if field.name != "residual"]
    for b, start in enumerate(leaf.starts):
        parts = [_pad(contents.read(i, b, field), field) for field in fields]
        stored = reference.from_arrays(leaf.format, parts, signed)
        index = tuple(slice(at, at + n) for at, n in zip(start, leaf.box, strict=True))
        decoded = reference.decode(stored, signed, math.prod(leaf.box))
        for (name, _), flat in zip(states, decoded, strict=True):
            values[name][index] = flat.reshape(leaf.box)
    return values


def _pad(array: np.ndarray, field: Field) -> np.ndarray:
    """An array as the extension returns it: flat, of whole blocks, words as float32."""
    if field.is_per_block:
        return array.view(np.float32)
    return np.pad(array.ravel(), (0, -array.size % BLOCK))


def _mesh(state: PagedState, reports: list[dict[str, Any]]) -> tuple[Mesh, Shards]:
    """The devices that a state was updated on, and how leaves are cut along them."""
    if not reports[0]["shards"]:
        raise NotImplementedError(
            "moments() does not know which part of the parameters each device has: the state was"
            " updated inside jax.shard_map or jax.pmap, or on a mesh with axes of several types."
            " Update it under jax.jit with sharded arrays on a mesh of one type instead."
        )
    shards = Shards.decode(reports[0]["shards"])
    sharding = jnp.asarray(state.token).sharding
    num_devices = reports[0]["num_devices"]
    if not isinstance(sharding, NamedSharding) or sharding.mesh.size != num_devices:
        raise RuntimeError(
            f"the state was updated on {num_devices} devices, but its token has the sharding"
            f" {sharding}; pass the state as update returned it"
        )
    assert isinstance(sharding.mesh, Mesh)
    return sharding.mesh, shards


def _assemble(
    mesh: Mesh, shards: Shards, reports: list[dict[str, Any]], handle: int, version: int
) -> list[Values]:
    """Whole leaves out of the shards of all devices, those of other processes included."""
    devices = list(mesh.devices.flat)
    local = [i for i, device in enumerate(devices) if device.process_index == jax.process_index()]
    positions = {_ordinal(devices[i]): i for i in local}
    shapes = [shape for _, shape in reports[0]["leaves"]]
    leaves = [
        {name: np.zeros(shards.whole(i, shape), np.float32) for name, _ in _states_of(reports[0])}
        for i, shape in enumerate(shapes)
    ]
    for report in reports:
        for i, part in enumerate(_read_device(report, handle, version)):
            index = shards.index(i, positions[report["ordinal"]], shapes[i])
            for name, shard in part.items():
                leaves[i][name][index] = shard
    if len(local) == len(devices):
        return leaves
    for i, shape in enumerate(shapes):  # one by one: every process gets every process's copy
        for whole in leaves[i].values():
            copies = multihost_utils.process_allgather(whole)
            for position, device in enumerate(devices):
                index = shards.index(i, position, shape)
                whole[index] = copies[device.process_index][index]
    return leaves


def _ordinal(device: Any) -> int:
    """The number by which handlers know a device of this process."""
    return device.id if device.platform == "cpu" else device.local_hardware_id


def _states_of(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Names and roles of the states that the moments' rule has."""
    return RULES[report["rule"]]["states"]


def _read_device(report: dict[str, Any], handle: int, version: int) -> list[Values]:
    """The moments of every leaf on one device, dequantized."""
    states = _states_of(report)
    signed = [role == "signed" for _, role in states]
    leaves = []
    arrays = _ext.read_leaves(report["platform"], report["ordinal"], handle, version)
    for (format, shape), parts in zip(report["leaves"], arrays, strict=True):
        stored = reference.from_arrays(format, parts, signed)
        values = reference.decode(stored, signed, math.prod(shape))
        leaves.append(
            {name: flat.reshape(shape) for (name, _), flat in zip(states, values, strict=True)}
        )
    return leaves
