"""What a state stores, described by whole leaves: the same for memory, files and arrays.

A leaf that is cut over devices is a grid of boxes of one shape. Each box has arrays of its own:
codes (or float32 values) of every moment in the box's shape, and words of 256 elements each, in the
order of the box. Padding is not among them: it always has the code of zero.
"""

import dataclasses
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ._ahead import ahead
from ._tables import FORMAT_NAMES, FORMATS, RULES, rule_number

BLOCK = 256  # elements

Shape = tuple[int, ...]


class Field(NamedTuple):
    """One array of a box."""

    name: str
    dtype: np.dtype
    is_per_block: bool  # a word for each block, or else a code for each element

    def shape(self, box: Shape) -> Shape:
        return (-(-math.prod(box) // BLOCK),) if self.is_per_block else box


class FilePart(NamedTuple):
    """An array that is in a file, as the extension takes it too."""

    path: str
    offset: int
    nbytes: int
    crc: int | None  # None: not known

    def load(self, dtype: np.dtype, shape: Shape) -> np.ndarray:
        """The array.

        Raises:
          Damaged: if it is not what was written.
          OSError: if the file cannot be read.
        """
        array = np.empty(shape, dtype)
        data = memoryview(array.reshape(-1)).cast("B")
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            if file.readinto(data) != self.nbytes:
                raise Damaged(f"{self.path} is damaged: it is cut off")
        if self.crc is not None and zlib.crc32(data) != self.crc:
            raise Damaged(
                f"{self.path} is damaged: the {self.nbytes} bytes at {self.offset} are not what was"
                " written"
            )
        return array


class MemoryPart(NamedTuple):
    """An array that a device has, while its snapshot is open; as the extension takes it too."""

    snapshot: Any
    leaf: int
    kind: str
    state: int

    def load(self, dtype: np.dtype, shape: Shape) -> np.ndarray:
        """A copy of it."""
        array = self.snapshot.read_part(self.leaf, self.kind, self.state)
        return array.view(dtype).reshape(shape)


Data = np.ndarray | FilePart | MemoryPart  # an array, or where it is


class Damaged(ValueError):
    """Moments from outside are not what was written."""


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One leaf, and which of its boxes there are."""

    name: str  # its path in the tree
    shape: Shape  # of the whole leaf
    format: str  # a name in `_tables.FORMAT_NAMES`
    box: Shape  # the shape of every box
    starts: tuple[Shape, ...]  # where the boxes begin

    @property
    def num_boxes(self) -> int:
        """How many boxes the whole leaf has."""
        pairs = zip(self.shape, self.box, strict=True)
        return math.prod(whole // part if part else 1 for whole, part in pairs)


@dataclasses.dataclass(frozen=True)
class Contents:
    """The moments of one state, or what one process has of them.

    Attributes:
      rule: of the optimizer, a name in `_tables.RULES`.
      has_residuals: whether residuals of 16-bit parameters are stored too.
      tree: the number of the tree of the parameters, see `_names`; 0 if it is not known.
      leaves: in tree order.
      data: the array of a field, or where it is, by leaf, box (numbers) and name of the field.
      count: updates that the state has seen; None if that is kept elsewhere.
    """

    rule: str
    has_residuals: bool
    tree: int
    leaves: tuple[Leaf, ...]
    data: Callable[[int, int, str], Data]
    count: int | None = None

    def read(self, leaf: int, box: int, field: Field) -> np.ndarray:
        """An array. Raises as `FilePart.load`."""
        found = self.data(leaf, box, field.name)
        if isinstance(found, np.ndarray):
            return found
        return found.load(field.dtype, field.shape(self.leaves[leaf].box))

    def fields(self, leaf: Leaf) -> list[Field]:
        return fields_of(self.rule, leaf.format, self.has_residuals)

    def keys(self) -> list[tuple[int, int, Field]]:
        """Leaf, box and field of all arrays, in the order in which a file has them."""
        return [
            (i, b, field)
            for i, leaf in enumerate(self.leaves)
            for b in range(len(leaf.starts))
            for field in self.fields(leaf)
        ]


def fields_of(rule: str, format: str, has_residuals: bool) -> list[Field]:
    """The arrays of a box, in their order in the extension, with the residuals at the end."""
    states = RULES[rule_number(rule)]["states"]
    u8, u32, f32 = np.dtype(np.uint8), np.dtype(np.uint32), np.dtype(np.float32)
    row = FORMATS[FORMAT_NAMES.index(format)]
    code = {1: u8, 2: np.dtype(np.uint16), 4: f32}[row["code_bytes"]]
    fields = [Field(name, code, False) for name, _ in states]
    for name, role in states if row["words_per_state"] else ():
        if row["stores_ratios"] and role == "nonnegative":
            fields.append(Field(f"{name}_window", u32, True))
        else:
            fields.append(Field(f"{name}_scale", f32, True))
    return [*fields, Field("residual", u8, False)] if has_residuals else fields


def nbytes_of(contents: Contents) -> int:
    """Bytes of all arrays."""
    return sum(
        field.dtype.itemsize * math.prod(field.shape(contents.leaves[i].box))
        for i, _, field in contents.keys()
    )


def check_leaf(leaf: Leaf) -> None:
    """Refuses what is no leaf cut into a grid of boxes; for leaves from outside.

    Raises:
      ValueError: says what is wrong.
    """
    if leaf.format not in FORMAT_NAMES:
        raise ValueError(f"leaf {leaf.name}: unknown format {leaf.format!r}")
    if len(leaf.box) != len(leaf.shape):
        raise ValueError(f"leaf {leaf.name}: boxes {leaf.box} in a leaf of shape {leaf.shape}")
    for whole, part in zip(leaf.shape, leaf.box, strict=True):
        if not (0 < part <= whole and whole % part == 0 or whole == part == 0):
            raise ValueError(f"leaf {leaf.name}: boxes {leaf.box} in a leaf of shape {leaf.shape}")
    if len(set(leaf.starts)) != len(leaf.starts):
        raise ValueError(f"leaf {leaf.name}: a box is there twice")
    for start in leaf.starts:
        if len(start) != len(leaf.shape) or not all(
            0 <= at <= whole - part and (at == 0 or at % part == 0)
            for at, whole, part in zip(start, leaf.shape, leaf.box, strict=True)
        ):
            raise ValueError(f"leaf {leaf.name}: no box begins at {start}")


def merge(parts: Sequence[Contents]) -> Contents:
    """One state of what several processes have of it, each box once.

    Raises:
      ValueError: if they do not belong together, or boxes are missing.
    """
    first = parts[0]
    leaves, places = [], []
    for i, leaf in enumerate(first.leaves):
        found: dict[Shape, Any] = {}
        for part in parts:
            other = part.leaves[i] if i < len(part.leaves) else None
            if other is None or dataclasses.replace(other, starts=leaf.starts) != leaf:
                raise ValueError(f"leaf {leaf.name} is not the same in all files")
            for b, start in enumerate(other.starts):
                found.setdefault(start, (part, b))
        if len(found) != leaf.num_boxes:
            raise ValueError(
                f"leaf {leaf.name}: {len(found)} of its {leaf.num_boxes} parts are there. Is the"
                " file of a process missing?"
            )
        leaves.append(dataclasses.replace(leaf, starts=tuple(sorted(found))))
        places.append([found[start] for start in sorted(found)])
    for part in parts:
        if dataclasses.replace(part, leaves=first.leaves, data=first.data) != first:
            raise ValueError("the files of the processes are not of one state")

    def data(i: int, b: int, name: str) -> Data:
        part, at = places[i][b]
        return part.data(i, at, name)

    return dataclasses.replace(first, leaves=tuple(leaves), data=data)


def copy(contents: Contents) -> Contents:
    """The same, with all arrays in host memory."""
    keys = contents.keys()
    # The copies are all kept, so there is no limit.
    arrays = ahead(keys, lambda key: contents.read(*key), lambda key: 0)
    named = zip(keys, arrays, strict=True)
    return with_arrays(contents, {(i, b, field.name): array for (i, b, field), array in named})


def with_arrays(contents: Contents, arrays: Mapping[tuple[int, int, str], Data]) -> Contents:
    """The same, with data by leaf, box and name of the field."""
    return dataclasses.replace(contents, data=lambda *key: arrays[key])
