"""The text that describes states next to their arrays, and the names of the arrays.

It is input from outside when it comes back: nothing in it is used before it is checked.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ._contents import BLOCK, Contents, Damaged, Field, FilePart, Leaf, check_leaf, with_arrays
from ._tables import RULES

FORMAT = 1  # goes up when older versions of the library could not read what this one writes
_MAX_DIMS = 64


class Newer(ValueError):
    """A newer version of the library wrote this."""


def encode(states: Sequence[Contents | None], **extra: Any) -> str:
    """The text for states (None: never updated), with whatever else it is to say."""
    described = [None if contents is None else _describe(contents) for contents in states]
    return json.dumps({"format": FORMAT, "block": BLOCK, "states": described, **extra})


class Entry(NamedTuple):
    """One array of the states in a file or a dict."""

    key: str  # its name there, such as ``0.3['decoder']['kernel'].0.mu``
    state: int
    contents: Contents
    leaf: int
    box: int
    field: Field

    @property
    def shape(self) -> tuple[int, ...]:
        return self.field.shape(self.contents.leaves[self.leaf].box)

    def read(self) -> np.ndarray:
        return self.contents.read(self.leaf, self.box, self.field)


def entries_of(states: Sequence[Contents | None]) -> Iterator[Entry]:
    """All arrays of states, in the order in which a file has them."""
    for s, contents in enumerate(states):
        if contents is None:
            continue
        for i, b, field in contents.keys():
            key = f"{s}.{i}{contents.leaves[i].name}.{b}.{field.name}"
            yield Entry(key, s, contents, i, b, field)


def with_data(
    states: Sequence[Contents | None], data: Mapping[str, np.ndarray | FilePart]
) -> list[Contents | None]:
    """The states with data by the keys of their entries."""
    places: list[dict[Any, Any]] = [{} for _ in states]
    for entry in entries_of(states):
        places[entry.state][entry.leaf, entry.box, entry.field.name] = data[entry.key]
    pairs = zip(states, places, strict=True)
    return [contents and with_arrays(contents, found) for contents, found in pairs]


def _describe(contents: Contents) -> dict[str, Any]:
    return {
        "rule": contents.rule,
        "count": contents.count,
        "has_residuals": contents.has_residuals,
        "tree": contents.tree,
        "leaves": [
            {
                "name": leaf.name,
                "shape": leaf.shape,
                "format": leaf.format,
                "box": leaf.box,
                "starts": leaf.starts,
            }
            for leaf in contents.leaves
        ],
    }


def decode(text: Any) -> tuple[list[Contents | None], dict[str, Any]]:
    """The states that a text describes, without arrays, and what else it says.

    Raises:
      Newer: if this version of the library does not know the format.
      Damaged: if it is not as `encode` returned it.
    """
    try:
        about = json.loads(text)
        return _decode_states(about), about
    except Newer:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise Damaged(f"{type(error).__name__}: {error}") from None


def _decode_states(about: dict[str, Any]) -> list[Contents | None]:
    version = _integer(about.pop("format"))
    if version > FORMAT:
        raise Newer(
            f"it has format {version}, and this version of paged_optax reads formats up to"
            f" {FORMAT}; install a newer one"
        )
    if version < 1 or about.pop("block") != BLOCK:
        raise Damaged("unknown format")
    return [None if state is None else _decode(state) for state in about.pop("states")]


def _decode(state: dict[str, Any]) -> Contents:
    if state["rule"] not in [rule["name"] for rule in RULES]:
        raise Damaged(f"unknown optimizer {state['rule']!r}")
    if not isinstance(state["has_residuals"], bool):
        raise Damaged("has_residuals is not a bool")
    count = None if state["count"] is None else _integer(state["count"])
    if count is not None and count >= 2**31:
        raise Damaged(f"a count of {count}")
    leaves = []
    for leaf in state["leaves"]:
        if not isinstance(leaf["name"], str):
            raise Damaged("the name of a leaf is not text")
        shape, box = _shape(leaf["shape"]), _shape(leaf["box"])
        starts = tuple(_shape(start) for start in leaf["starts"])
        leaves.append(Leaf(leaf["name"], shape, leaf["format"], box, starts))
        check_leaf(leaves[-1])

    tree = state["tree"]
    if type(tree) is not int or not -(2**63) <= tree < 2**63:
        raise Damaged("tree is not a number")
    return Contents(state["rule"], state["has_residuals"], tree, tuple(leaves), _no_data, count)


def _no_data(i: int, b: int, name: str) -> np.ndarray:
    raise AssertionError("arrays come later")


def _integer(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise Damaged(f"{value!r} is not a size")
    return value


def _shape(sizes: Any) -> tuple[int, ...]:
    if not isinstance(sizes, list) or len(sizes) > _MAX_DIMS:
        raise Damaged(f"{str(sizes)[:80]} is not a shape")
    return tuple(_integer(size) for size in sizes)
