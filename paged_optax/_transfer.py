"""Contents of states out of memory, and back into memory under a new token.

Restoring is lazy: a new token stands for contents that the extension has not looked at yet. The
first update that takes it makes the moments' memory, compares names, shapes and formats with the
gradients', and fills it.
"""

import contextlib
import dataclasses
import itertools
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from . import _ext
from ._contents import Contents, Data, Field, FilePart, Leaf, MemoryPart, Shape, fields_of
from ._holding import holding
from ._job import share_base
from ._shards import Shards
from ._state import read_handle
from ._watch import await_steps

# Of each handle that was staged: its contents, without keeping arrays alive. The extension has a
# reference until the first update.
_staged: dict[int, Contents] = {}


@contextlib.contextmanager
def opened(token: Any, count: int | None = None) -> Iterator[Contents | None]:
    """The moments of a state on the devices of this process, each box once.

    Meanwhile no step of the state can start. So wait for nothing that may wait for one, such as a
    step, a device or a lock, and run no code of the user.

    Of a box that several devices have, it is the first copy along the mesh. If another process has
    that one, the box is left to it.

    Args:
      token: the array of the newest state's token.
      count: what `Contents.count` is to be.

    Yields:
      The contents, whose arrays can be read until the context ends; None for a state that was never
      updated.

    Raises:
      RuntimeError: if the state is not the newest one, or was released, or is not in this process.
      NotImplementedError: if it is not known which part of the parameters each device has.
    """
    with all_opened([token], [count]) as (contents,):
        yield contents


@contextlib.contextmanager
def all_opened(
    tokens: Sequence[Any], counts: Sequence[int | None]
) -> Iterator[list[Contents | None]]:
    """As `opened`, of several states at once.

    One after the other would not do: the steps of those that are open wait, and may keep others
    from being done on another GPU.
    """
    found = [_find(token, count) for token, count in zip(tokens, counts, strict=True)]
    wanted = [place for places in found if isinstance(places, list) for place in places]
    with holding(), contextlib.ExitStack() as stack:
        snapshots = iter([stack.enter_context(each) for each in _ext.snapshots(wanted)])
        states = []
        for places, token, count in zip(found, tokens, counts, strict=True):
            if isinstance(places, list):
                its_own = list(itertools.islice(snapshots, len(places)))
                states.append(_read(its_own, _mesh(token, its_own[0].num_devices), count))
            else:
                states.append(places)
        yield states


# Of a snapshot: platform, ordinal, handle and version.
_Place = tuple[str, int, int, int]


def _find(token: Any, count: int | None) -> Contents | None | list[_Place]:
    """Contents that are not in memory yet, or where those are that are; None without any."""
    handle, version = read_handle(token)
    staged = find_staged(handle, version)
    if staged is not None:
        return staged if count is None else dataclasses.replace(staged, count=count)
    reports = _ext.describe(handle, version)
    if version == 0 or not any(report["version"] for report in reports):
        return None  # with replay=True its first step may have run and been dropped
    num_devices = reports[0]["num_devices"]
    if jax.process_count() == 1 and len(reports) != num_devices:
        raise RuntimeError(
            f"the moments of this optimizer state are on {len(reports)} of its {num_devices}"
            " devices: its first update failed on the others, or is under way in another thread."
            " Run it again, or wait for it with jax.block_until_ready"
        )
    return [(report["platform"], report["ordinal"], handle, version) for report in reports]


def _mesh(token: Any, num_devices: int) -> Any:
    """The mesh that a token is on; None where nothing tells."""
    sharding = getattr(token, "sharding", None)
    if not isinstance(sharding, NamedSharding) or sharding.mesh.size != num_devices:
        return None
    return sharding.mesh


def _read(snapshots: Sequence[Any], mesh: Any, count: int | None) -> Contents:
    """The contents that snapshots of all devices of this process have."""
    first = snapshots[0]
    if first.boxes is None:
        raise NotImplementedError(
            "it is not known which part of the parameters each device has: the state was updated"
            " inside jax.shard_map or jax.pmap, or on a mesh with axes of several types. Update it"
            " under jax.jit with sharded arrays on a mesh of one type instead."
        )
    leaves, places = [], []
    for i, (format, box) in enumerate(zip(first.formats, first.shapes, strict=True)):
        owners: dict[Shape, Any] = {}
        for snapshot in snapshots:
            owners.setdefault(tuple(snapshot.boxes[i][1]), snapshot)
        starts = sorted(start for start in owners if _is_here(first, mesh, i, start))
        name = first.names[i] if first.names else ""
        whole = tuple(first.boxes[i][0])
        leaves.append(Leaf(name, whole, format, tuple(box), tuple(starts)))
        places.append([owners[start] for start in starts])

    def data(i: int, b: int, name: str) -> MemoryPart:
        fields = fields_of(first.rule, leaves[i].format, first.has_residuals)
        return _part_of(places[i][b], i, fields, name)

    return Contents(first.rule, first.has_residuals, first.tree, tuple(leaves), data, count)


def _is_here(snapshot: Any, mesh: Any, leaf: int, start: Shape) -> bool:
    """Whether the first device along the mesh that has a box belongs to this process."""
    if mesh is None or not snapshot.shards:
        return True
    shards, shape = Shards.decode(snapshot.shards), snapshot.shapes[leaf]
    for position, device in enumerate(mesh.devices.flat):
        index = shards.index(leaf, position, shape)
        if tuple(part.start for part in index) == start:
            return device.process_index == jax.process_index()
    raise AssertionError(start)


def _part_of(snapshot: Any, leaf: int, fields: Sequence[Field], name: str) -> MemoryPart:
    """One array of a leaf on one device."""
    codes, words = _names_of(fields)
    if name == "residual":
        return MemoryPart(snapshot, leaf, "residuals", 0)
    if name in words:
        return MemoryPart(snapshot, leaf, "words", words.index(name))
    return MemoryPart(snapshot, leaf, "codes", codes.index(name))


def _names_of(fields: Sequence[Field]) -> tuple[list[str], list[str]]:
    """Of the arrays with codes, and of those with words."""
    codes = [field.name for field in fields if not field.is_per_block and field.name != "residual"]
    return codes, [field.name for field in fields if field.is_per_block]


def stage(contents: Contents, *, convert: bool = False, shared: bool = False) -> np.ndarray:
    """A new token for contents, which all have to be there.

    Args:
      contents: from anywhere.
      convert: whether a step may store them in another format.
      shared: whether other processes do the same, for a state on devices of all of them.

    Returns:
      int32 (2,): handle and version.

    Raises:
      ValueError: if the contents contradict themselves.
    """
    if shared:
        share_base()
    arrays = {
        (i, b, field.name): contents.data(i, b, field.name) for i, b, field in contents.keys()
    }
    token = _ext.stage(
        {
            "rule": contents.rule,
            "has_residuals": contents.has_residuals,
            "convert": convert,
            "shared": shared,
            "local_devices": jax.local_device_count(),
            "leaves": [_spec(contents, i, leaf, arrays) for i, leaf in enumerate(contents.leaves)],
        }
    )
    _remember(token[0], contents, arrays)
    return np.array(token, np.int32)


def _spec(
    contents: Contents, i: int, leaf: Leaf, arrays: Mapping[tuple[int, int, str], Any]
) -> dict[str, Any]:
    """A leaf as the extension takes it."""
    codes, words = _names_of(contents.fields(leaf))
    return {
        "name": leaf.name,
        "shape": leaf.shape,
        "format": leaf.format,
        "pieces": [
            {
                "start": start,
                "shape": leaf.box,
                "codes": [arrays[i, b, name] for name in codes],
                "words": [arrays[i, b, name] for name in words],
                "residuals": arrays[i, b, "residual"] if contents.has_residuals else None,
            }
            for b, start in enumerate(leaf.starts)
        ],
    }


def _remember(handle: int, contents: Contents, arrays: Mapping[tuple[int, int, str], Any]) -> None:
    for old in [old for old in _staged if _ext.staged(old) is None]:
        del _staged[old]
    places = {
        key: data if isinstance(data, FilePart) else weakref.ref(data)
        for key, data in arrays.items()
    }

    def data(*key: Any) -> Data:
        place = places[key]
        array = place if isinstance(place, FilePart) else place()
        if array is None:
            raise _ext.StateRefused(
                "this optimizer state was updated meanwhile; pass the newest one"
            )
        return array

    _staged[handle] = dataclasses.replace(contents, data=data)


def find_staged(handle: int, version: int) -> Contents | None:
    """What waits for the first update that takes a token, if anything does."""
    waiting = _ext.staged(handle) if version == 1 else None
    if waiting is not None and waiting["filled"]:
        await_steps()  # so that all devices have their moments, and not some of them
        waiting = _ext.staged(handle)
    return None if waiting is None or waiting["filled"] else _staged.get(handle)
