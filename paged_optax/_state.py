"""The optimizer state, and what can be asked of it.

Moments live outside JAX and change in place. The state holds a token for them: a handle, which
memory, and a version, which contents of it. Every executed update makes a new version, so a token
that is not the newest is recognised and refused, and the moments stay as they were.
`xla_ffi/README.md` gives the full contract.
"""

import dataclasses
import functools
import hashlib
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.sharding import NamedSharding

from . import _ext, _ffi, _partition
from . import _reference as reference

FLOAT32, DYNAMIC, RATIO = 0, 1, 2  # enum Codec in xla_ffi/layout.h
CODECS = {"dynamic": DYNAMIC, "ratio": RATIO}  # by the names in Quantization


class ScaleByPagedAdam8bitState(NamedTuple):
    """State of `scale_by_paged_adam8bit`: a few integers, whatever the size of the model."""

    # `count` hides tuple.count, as in optax's own states.
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]  int32 (): updates so far
    token: jax.Array  # int32 (2,): handle of the moments, version of their contents


_seeds = itertools.count()
_trees: dict[int, Any] = {}  # tree name -> treedef, filled while tracing


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
    _trees[name] = treedef
    return name


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little", signed=True)


class Moments(NamedTuple):
    """Dequantized moments, in the tree of the parameters: float32 NumPy arrays."""

    mu: Any
    nu: Any


def moments(opt_state: Any) -> Moments:
    """Reads the moments of an optimizer state.

    Waits for the updates under way. For looking at and for tests; at 8 bytes per parameter the
    result is four times as large as what is stored.

    Args:
      opt_state: any optax state, nnx.Optimizer or TrainState with a paged state in it.

    Returns:
      A `Moments` of float32 NumPy arrays in the tree of the updates. States for disjoint parts of
      one tree (``optax.partition``, ``optax.masked``) are merged.

    Raises:
      ValueError: if there is no paged state, or several for the same parameters.
      RuntimeError: if the state is not the newest one, was released, or was never updated.

    Example:
      >>> import jax, jax.numpy as jnp, paged_optax
      >>> tx = paged_optax.scale_by_paged_adam8bit()
      >>> params = {"w": jnp.ones((64, 64))}
      >>> updates, state = tx.update({"w": jnp.full((64, 64), 2.0)}, tx.init(params))
      >>> print(paged_optax.moments(state).mu["w"][0, 0].round(4))
      0.2
    """
    trees = [_read_state(state) for state in find_states(opt_state)]
    try:
        return Moments(*(functools.reduce(_merge, [tree[i] for tree in trees]) for i in range(2)))
    except _Overlap:
        raise ValueError(
            f"found {len(trees)} paged states for the same parameters; pass one of them, for"
            " example opt_state[0]"
        ) from None


@dataclasses.dataclass(frozen=True)
class DeviceMemory:
    """Bytes of moments on one device.

    Attributes:
      device: platform and number, such as ``cuda:0``.
      total: all bytes.
      resident: those in the device's own memory.
      replay: those of the second copy that ``replay=True`` keeps; part of the total.
    """

    device: str
    total: int
    resident: int
    replay: int = 0

    @property
    def on_host(self) -> int:
        return self.total - self.resident


@dataclasses.dataclass(frozen=True)
class MemoryReport:
    """Where the moments are. Prints as a table.

    Attributes:
      devices: one `DeviceMemory` a device.
    """

    devices: tuple[DeviceMemory, ...]

    @property
    def total(self) -> int:
        """Bytes of moments, over all devices."""
        return sum(device.total for device in self.devices)

    @property
    def resident(self) -> int:
        """Bytes of moments in the devices' own memory."""
        return sum(device.resident for device in self.devices)

    @property
    def on_host(self) -> int:
        """Bytes of moments in host memory that a GPU reaches over its link."""
        return sum(device.on_host for device in self.devices)

    @property
    def replay(self) -> int:
        """Bytes of the second copies that ``replay=True`` keeps; part of the total."""
        return sum(device.replay for device in self.devices)

    def __str__(self) -> str:
        columns = ["total", "resident", "on_host", *["replay"] * (self.replay > 0)]
        rows = list(self.devices)
        if len(rows) != 1:
            rows.append(DeviceMemory("all", self.total, self.resident, self.replay))
        lines = [f"{'moments':<10}" + "".join(f"{c.replace('_', ' '):>12}" for c in columns)]
        for row in rows:
            numbers = "".join(f"{format_bytes(getattr(row, c)):>12}" for c in columns)
            lines.append(f"{row.device:<10}{numbers}")
        return "\n".join(lines)


def memory_report(opt_state: Any) -> MemoryReport:
    """Reports where the moments of an optimizer state are.

    Moments are made by a state's first update; before it there is nothing to report.

    Args:
      opt_state: any optax state, nnx.Optimizer or TrainState with paged states in it.

    Returns:
      A `MemoryReport`, all paged states added up.

    Raises:
      ValueError: if there is no paged state.
      RuntimeError: if the moments were released or are not in this process.

    Example:
      >>> import jax.numpy as jnp, paged_optax
      >>> tx = paged_optax.scale_by_paged_adam8bit()
      >>> params = {"w": jnp.ones((1024, 1024))}
      >>> _, state = tx.update(params, tx.init(params))
      >>> print(f"{paged_optax.memory_report(state).total / 1024**2:.2f} bytes per parameter")
      2.03 bytes per parameter
    """
    devices: dict[str, list[int]] = {}
    tokens = dict(_read_token(state) for state in find_states(opt_state))
    for token in tokens.items():  # several versions of one state count once
        for report in _ext.describe(*token):
            name = f"{report['platform']}:{report['ordinal']}"
            numbers = devices.setdefault(name, [0, 0, 0])
            for i, kind in enumerate(["total", "resident", "replay"]):
                numbers[i] += report[kind]
    return MemoryReport(tuple(DeviceMemory(name, *numbers) for name, numbers in devices.items()))


def release(opt_state: Any) -> int:
    """Frees the moments of an optimizer state. The state cannot be updated any more.

    Args:
      opt_state: any optax state, nnx.Optimizer or TrainState with paged states in it, of any
        version.

    Returns:
      The number of bytes freed.

    Raises:
      ValueError: if there is no paged state.

    Example:
      >>> import jax.numpy as jnp, paged_optax
      >>> tx = paged_optax.scale_by_paged_adam8bit()
      >>> params = {"w": jnp.ones((1024, 1024))}
      >>> _, state = tx.update(params, tx.init(params))
      >>> paged_optax.release(state) >= 2 * 1024**2
      True
    """
    handles = {_read_token(state)[0] for state in find_states(opt_state)}
    return sum(_ext.release(handle) for handle in handles)


def release_all() -> int:
    """Frees the moments of every optimizer state of this process, also of states that are lost.

    For notebooks, where states get lost when a cell runs again. No state made so far can be
    updated any more.

    Returns:
      The number of bytes freed.

    Example:
      >>> import jax.numpy as jnp, paged_optax
      >>> tx = paged_optax.scale_by_paged_adam8bit()
      >>> params = {"w": jnp.ones((1024, 1024))}
      >>> for _ in range(2):
      ...   _, state = tx.update(params, tx.init(params))
      >>> paged_optax.release_all() >= 2 * 2 * 1024**2
      True
    """
    return _ext.release_all()


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


def format_bytes(nbytes: int) -> str:
    """Bytes for people: ``2.03 MiB``."""
    value, units = float(nbytes), ["B", "KiB", "MiB", "GiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{nbytes} B" if units[0] == "B" else f"{value:.2f} {units[0]}"


def _read_token(state: ScaleByPagedAdam8bitState) -> tuple[int, int]:
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


def _read_state(state: ScaleByPagedAdam8bitState) -> tuple[Any, Any]:
    handle, version = _read_token(state)
    reports = _ext.describe(handle, version)
    if not reports:
        raise RuntimeError(
            "this optimizer state was never updated: its moments are zero and have no memory yet"
        )
    first = reports[0]
    if first["tree"] not in _trees:
        raise RuntimeError("the tree of the parameters is unknown: the update was not traced here")
    if first["num_devices"] == 1:
        parts = [_read_shards(first, handle, version)]
        leaves = parts[0]
    else:
        positions, shards = _positions(state, reports)
        leaves = [
            [np.empty(shards.whole(i, shape), np.float32) for _ in range(2)]
            for i, (_, shape) in enumerate(first["leaves"])
        ]
        for report in reports:
            position = positions[report["ordinal"]]
            for i, part in enumerate(_read_shards(report, handle, version)):
                index = shards.index(i, position, part[0].shape)
                for whole, shard in zip(leaves[i], part, strict=True):
                    whole[index] = shard
    mu, nu = zip(*leaves, strict=True)
    treedef = _trees[first["tree"]]
    return jax.tree.unflatten(treedef, mu), jax.tree.unflatten(treedef, nu)


def _positions(
    state: ScaleByPagedAdam8bitState, reports: list[dict[str, Any]]
) -> tuple[dict[int, int], _partition.Shards]:
    """Where in the mesh each local device is, by its ordinal, and how leaves are cut along it."""
    if not reports[0]["shards"]:
        raise NotImplementedError(
            "moments() does not know which part of the parameters each device has: the state was"
            " updated inside jax.shard_map or jax.pmap, or on a mesh with axes of several types."
            " Update it under jax.jit with sharded arrays on a mesh of one type instead."
        )
    shards = _partition.Shards.decode(reports[0]["shards"])
    sharding = jnp.asarray(state.token).sharding
    num_devices = reports[0]["num_devices"]
    if not isinstance(sharding, NamedSharding) or sharding.mesh.size != num_devices:
        raise RuntimeError(
            f"the state was updated on {num_devices} devices, but its token has the sharding"
            f" {sharding}; pass the state as update returned it"
        )
    ids = [device.id for device in np.ravel(np.asarray(sharding.mesh.devices))]
    if len(reports) < len(ids):
        raise RuntimeError(
            f"{len(ids) - len(reports)} of the {len(ids)} devices with moments of this state belong"
            " to other processes, and moments() reads those of its own only"
        )
    local = jax.local_devices(backend=reports[0]["platform"])
    return {d.local_hardware_id: ids.index(d.id) for d in local if d.id in ids}, shards


def _read_shards(report: dict[str, Any], handle: int, version: int) -> list[list[np.ndarray]]:
    """Dequantized mu and nu of every leaf on one device."""
    leaves = []
    for index, (codec, shape) in enumerate(report["leaves"]):
        parts = _ext.read_leaf(report["platform"], report["ordinal"], handle, version, index)
        if codec == DYNAMIC:
            mu_codes, nu_codes, mu_scales, nu_scales = parts
            parts = (
                reference.dequantize(reference.Quantized(mu_codes, mu_scales), signed=True),
                reference.dequantize(reference.Quantized(nu_codes, nu_scales), signed=False),
            )
        elif codec == RATIO:
            parts = reference.dequantize_ratio(reference.RatioState(*parts))
        leaves.append([flat[: math.prod(shape)].reshape(shape) for flat in parts])
    return leaves
