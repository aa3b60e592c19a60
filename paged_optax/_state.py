"""The optimizer state, and what can be asked of it.

Moments live outside JAX and change in place. The state holds a token for them: a handle, which
memory, and a version, which contents of it. Every executed update makes a new version, so a token
that is not the newest is recognised and refused, and the moments stay as they were.
`xla_ffi/README.md` gives the full contract.
"""

import functools
import hashlib
import itertools
import math
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from . import _ext, _ffi, _partition
from . import _reference as reference
from ._shards import Shards

RATIO, DYNAMIC, FLOAT32 = 0, 1, 2  # enum Codec in xla_ffi/layout/layout.h
CODECS = {"dynamic": DYNAMIC, "ratio": RATIO}  # by the names in Quantization


class ScaleByPagedAdam8bitState(NamedTuple):
    """State of `scale_by_paged_adam8bit`: a few integers, whatever the size of the model."""

    # `count` hides tuple.count, as in optax's own states.
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]  int32 (): updates so far
    token: jax.Array  # int32 (2,): handle of the moments, version of their contents


class SkipNonFiniteState(NamedTuple):
    """State of a paged optimizer with ``non_finite="skip_element"`` or ``"skip_step"``.

    Inside `jax.shard_map` with ``check_vma=False``, and `jax.pmap`, an element of a gradient that
    devices have in common counts once a device.
    """

    skipped: jax.Array  # int32 (): gradient elements, or steps, that were skipped so far
    inner_state: Any  # that of the optimizer


_seeds = itertools.count()
trees: OrderedDict[int, Any] = OrderedDict()  # tree name -> treedef, the last traced at the end
MAX_TREES = 4096


def new_token(num_leaves: int) -> jax.Array:
    """Token of a new state. Without leaves there is nothing to store, so nothing is made."""
    if num_leaves == 0:
        return jnp.zeros(_ffi.TOKEN_SHAPE, jnp.int32)
    return _partition.issue(np.array([next(_seeds) % 2**31, 0], np.int32))


def name_paths(paths: Sequence[str]) -> int:
    """A number for the leaves of a tree: which there are, and in which order."""
    return _number("\n".join(paths))


@functools.lru_cache(maxsize=256)
def leaf_keys(paths: tuple[str, ...], seed: int) -> tuple[int, ...]:
    """A key for the random bits of each leaf, whatever its place in the tree."""
    return tuple(_number(f"{seed}\n{path}") for path in paths)


def name_tree(paths: Sequence[str], treedef: Any) -> int:
    """A number for a tree structure, to be kept beside the moments: how to show them as a tree."""
    # Without the addresses of objects, which would differ from process to process.
    containers = re.sub(r" at 0x[0-9a-f]+", "", str(treedef))
    name = _number("\n".join([*paths, containers]))
    trees[name] = treedef
    trees.move_to_end(name)
    if len(trees) > MAX_TREES:
        trees.popitem(last=False)
    return name


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little", signed=True)


class Moments(NamedTuple):
    """Dequantized moments, in the tree of the parameters: float32 NumPy arrays."""

    mu: Any
    nu: Any


def moments(opt_state: Any, *, gather: bool = False) -> Moments:
    """Reads the moments of an optimizer state.

    Waits for the updates under way. For looking at and for tests; at 8 bytes per parameter the
    result is four times as large as what is stored.

    Args:
      opt_state: any optax state, nnx.Optimizer or TrainState with a paged state in it.
      gather: of a state on devices of several processes (`jax.distributed`), collects the shards of
        all of them. Every process of the job must then call this, or those that do wait for ever.

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
    trees = [_read_state(state, gather) for state in find_states(opt_state)]
    try:
        return Moments(*(functools.reduce(_merge, [tree[i] for tree in trees]) for i in range(2)))
    except _Overlap:
        raise ValueError(
            f"found {len(trees)} paged states for the same parameters; pass one of them, for"
            " example opt_state[0]"
        ) from None


def find_states(opt_state: Any) -> list[ScaleByPagedAdam8bitState]:
    """The paged states inside any optimizer state, in tree order."""
    opt_state = getattr(opt_state, "opt_state", opt_state)  # nnx.Optimizer, TrainState
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: _as_state(node) is not None)
    states = [state for state in map(_as_state, nodes) if state is not None]
    if not states:
        raise ValueError(
            f"there is no paged optimizer state in this {type(opt_state).__name__}; pass what the"
            " optimizer's init or update returned (not the parameters)"
        )
    for state in states:
        _check_token(state.token)
    return states


def _as_state(node: Any) -> ScaleByPagedAdam8bitState | None:
    """The paged state that a node is, also where nnx.split or a state dict made a mapping of it."""
    if isinstance(node, Mapping) and set(node) == set(ScaleByPagedAdam8bitState._fields):
        state = ScaleByPagedAdam8bitState(**node)
    elif isinstance(node, ScaleByPagedAdam8bitState):
        state = node
    else:
        return None
    leaves = jax.tree.leaves(state.token)  # opens an nnx.Variable
    if len(leaves) == 1 and getattr(leaves[0], "dtype", None) == jnp.int32:
        return state._replace(token=leaves[0])
    return state if state is node else None  # None: parameters of these names


def _check_token(token: Any) -> None:
    if isinstance(token, jax.ShapeDtypeStruct):
        raise TypeError(
            "the optimizer state has shapes and no values (from jax.eval_shape?); pass one that"
            " init or update returned"
        )
    dtype, shape = getattr(token, "dtype", type(token).__name__), np.shape(token)
    if dtype != jnp.int32 or shape != _ffi.TOKEN_SHAPE:
        raise ValueError(
            f"the optimizer state's token is {dtype}{list(shape)}, and must be int32[2] as init"
            " returned it; of states that were stacked (jax.pmap, jax.lax.scan) pass one:"
            " jax.tree.map(lambda leaf: leaf[0], opt_state)"
        )


def read_token(state: ScaleByPagedAdam8bitState) -> tuple[int, int]:
    token = jnp.asarray(state.token)
    if isinstance(token, Tracer):
        raise TypeError(
            "the optimizer state is being traced (inside jax.jit or another transformation); call"
            " this outside of it"
        )
    token.block_until_ready()  # for the update that made it, on every device and not just the first
    copies = {tuple(np.asarray(shard.data).tolist()) for shard in token.addressable_shards}
    if len(copies) > 1:
        raise RuntimeError(
            f"the devices disagree about this optimizer state ({sorted(copies)}): a step was"
            " refused on some of them and ran on others. Make a new state with init(params)."
        )
    ((handle, version),) = copies
    return handle, version


class _Overlap(Exception):
    pass


def _merge(one: Any, other: Any) -> Any:
    """One tree out of two where either has MaskedNode, for a leaf or a subtree, or they agree."""
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


def _read_state(state: ScaleByPagedAdam8bitState, gather: bool) -> tuple[Any, Any]:
    handle, version = read_token(state)
    reports = _ext.describe(handle, version)
    # With replay=True its first step may have run and been dropped.
    if version == 0 or not any(report["version"] for report in reports):
        raise RuntimeError(
            "this optimizer state was never updated: its moments are zero, and not stored"
        )
    first = reports[0]
    if first["tree"] not in trees:
        raise RuntimeError(
            "the tree of the parameters is unknown: the update was not traced in this process, or"
            f" before those of {MAX_TREES} other models. Trace it again (an eager update does)."
        )
    if first["num_devices"] == 1:
        parts = [_read_shards(first, handle, version)]
        leaves = parts[0]
    else:
        mesh, shards = _mesh(state, reports)
        if len(reports) < mesh.size and not gather:
            raise RuntimeError(
                f"{mesh.size - len(reports)} of the {mesh.size} devices with moments of this state"
                " belong to other processes; to collect theirs, call"
                " moments(opt_state, gather=True) in every process"
            )
        leaves = _assemble(mesh, shards, reports, handle, version)
    mu, nu = zip(*leaves, strict=True)
    treedef = trees[first["tree"]]
    return jax.tree.unflatten(treedef, mu), jax.tree.unflatten(treedef, nu)


def _mesh(state: ScaleByPagedAdam8bitState, reports: list[dict[str, Any]]) -> tuple[Mesh, Shards]:
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
    mesh: Mesh,
    shards: Shards,
    reports: list[dict[str, Any]],
    handle: int,
    version: int,
) -> list[list[np.ndarray]]:
    """Whole leaves out of the shards of all devices, those of other processes included."""
    devices = list(mesh.devices.flat)
    local = [i for i, device in enumerate(devices) if device.process_index == jax.process_index()]
    positions = {_ordinal(devices[i]): i for i in local}
    shapes = [shape for _, shape in reports[0]["leaves"]]
    leaves = [
        [np.zeros(shards.whole(i, shape), np.float32) for _ in range(2)]
        for i, shape in enumerate(shapes)
    ]
    for report in reports:
        for i, part in enumerate(_read_shards(report, handle, version)):
            index = shards.index(i, positions[report["ordinal"]], shapes[i])
            for whole, shard in zip(leaves[i], part, strict=True):
                whole[index] = shard
    if len(local) == len(devices):
        return leaves
    for i, shape in enumerate(shapes):  # one by one: every process's copy comes to every process
        for whole in leaves[i]:
            copies = multihost_utils.process_allgather(whole)
            for position, device in enumerate(devices):
                index = shards.index(i, position, shape)
                whole[index] = copies[device.process_index][index]
    return leaves


def _ordinal(device: Any) -> int:
    """What handlers call a device of this process."""
    return device.id if device.platform == "cpu" else device.local_hardware_id


def _read_shards(report: dict[str, Any], handle: int, version: int) -> list[list[np.ndarray]]:
    """Dequantized mu and nu of every leaf on one device."""
    leaves = []
    stored = _ext.read_leaves(report["platform"], report["ordinal"], handle, version)
    for (codec, shape), parts in zip(report["leaves"], stored, strict=True):
        if codec == "dynamic":
            mu_codes, nu_codes, mu_scales, nu_scales = parts
            parts = (
                reference.dequantize(reference.Quantized(mu_codes, mu_scales), signed=True),
                reference.dequantize(reference.Quantized(nu_codes, nu_scales), signed=False),
            )
        elif codec == "ratio":
            parts = reference.dequantize_ratio(reference.RatioState(*parts))
        leaves.append([flat[: math.prod(shape)].reshape(shape) for flat in parts])
    return leaves
