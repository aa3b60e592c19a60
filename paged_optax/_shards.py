"""Which part of each leaf a device has, in numbers that do not need the mesh."""

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

from jax.sharding import PartitionSpec

# How one dimension of a leaf is cut: (parts, stride) per mesh axis, the slowest varying first. A
# device at `position` in the mesh has part position // stride % parts.
Cut = tuple[tuple[int, int], ...]
# The cuts of each dimension of each leaf.
Cuts = tuple[tuple[Cut, ...], ...]


@dataclasses.dataclass(frozen=True)
class Shards:
    """Which part of each leaf a device has. The compiled program carries it as text.

    Two texts are equal if all devices have the same parts, whatever the mesh axes are called.
    """

    cuts: Cuts

    def encode(self) -> str:
        kinds = list(dict.fromkeys(self.cuts))  # many leaves, few ways to cut them
        return json.dumps([kinds, [kinds.index(cut) for cut in self.cuts]])

    @classmethod
    def decode(cls, text: str) -> "Shards":
        kinds, leaves = json.loads(text)
        return cls(tuple(tuple(tuple(map(tuple, cut)) for cut in kinds[i]) for i in leaves))

    def index(self, leaf: int, position: int, shape: Sequence[int]) -> tuple[slice, ...]:
        """Where the shard, of `shape`, of the device at `position` lies in the whole leaf."""
        index = []
        for cut, size in zip(self.cuts[leaf], shape, strict=True):
            part = 0
            for parts, stride in cut:
                part = part * parts + position // stride % parts
            index.append(slice(part * size, (part + 1) * size))
        return tuple(index)

    def part(self, position: Any) -> Any:
        """The first position whose device has the same parts as the device at `position`.

        Two devices get the same number exactly if they have the same parts.
        """
        pairs = {pair for cuts in self.cuts for cut in cuts for pair in cut}
        spans = sorted((stride, stride * parts) for parts, stride in pairs)
        part, done = 0 * position, 1  # only the position's digits in these spans matter
        for start, end in spans:
            start = max(start, done)
            if end > start:
                part, done = part + position // start % (end // start) * start, end
        return part

    def whole(self, leaf: int, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the whole leaf, whose shards have `shape`."""
        return tuple(
            size * math.prod(parts for parts, _ in cut)
            for cut, size in zip(self.cuts[leaf], shape, strict=True)
        )


def cuts_of(mesh: Any, spec: PartitionSpec, ndim: int) -> tuple[Cut, ...]:
    """How `spec` cuts the dimensions of a leaf."""
    sizes = dict(mesh.shape)
    strides = dict(zip(sizes, _strides(list(sizes.values())), strict=True))
    dims = []
    for entry in [*spec, *[None] * (ndim - len(spec))]:
        names = () if entry is None else (entry,) if isinstance(entry, str) else entry
        cut: list[tuple[int, int]] = []
        for name in names:
            parts, stride = sizes[name], strides[name]
            if cut and cut[-1][1] == parts * stride:  # as one axis of the product of their sizes
                parts *= cut.pop()[0]
            if parts > 1:
                cut.append((parts, stride))
        dims.append(tuple(cut))
    return tuple(dims)


def _strides(sizes: Sequence[int]) -> list[int]:
    return [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]
