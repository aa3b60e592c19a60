"""Names of leaves and trees, and the numbers that stand for them in a compiled program."""

import functools
import hashlib
import re
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import jax

trees: OrderedDict[int, Any] = OrderedDict()  # tree name -> treedef, the last traced at the end
MAX_TREES = 4096


_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def names_of(paths: Sequence[Any]) -> tuple[str, ...]:
    """Names of the leaves of a tree: `jax.tree_util.keystr` of their paths.

    A key whose text has an address, as that of any object without a ``__repr__``, has its place
    among its neighbours instead: equal trees have equal names, in any process.
    """
    names = tuple(map(jax.tree_util.keystr, paths))
    if not any(_ADDRESS.search(name) for name in names):
        return names
    places: dict[tuple[str, str], dict[str, int]] = {}
    return tuple(_name_of(path, places) for path in paths)


def _name_of(path: Any, places: dict[tuple[str, str], dict[str, int]]) -> str:
    name = ""
    for key in path:
        text = jax.tree_util.keystr((key,))
        is_text = isinstance(getattr(key, "key", None), str)
        kind = text if is_text else _ADDRESS.sub("", text)
        if kind != text:
            place = places.setdefault((name, kind), {})
            kind += f"#{place.setdefault(text, len(place))}"
        name += kind
    return name


def is_by_place(name: str) -> bool:
    """Whether `names_of` told a key of this name apart by its place."""
    return "]#" in name


def number_paths(paths: Sequence[str]) -> int:
    """A number for the leaves of a tree: which there are, and in which order."""
    return _number("\n".join(paths))


@functools.lru_cache(maxsize=256)
def leaf_keys(paths: tuple[str, ...], seed: int) -> tuple[int, ...]:
    """A key for the random bits of each leaf, whatever its place in the tree."""
    return tuple(_number(f"{seed}\n{path}") for path in paths)


def number_tree(paths: Sequence[str], treedef: Any) -> int:
    """A number for a tree structure, kept with the moments: how to show them as a tree."""
    # Without the addresses of objects, which would differ from process to process.
    containers = _ADDRESS.sub("", str(treedef))
    number = _number("\n".join([*paths, containers]))
    trees[number] = treedef
    trees.move_to_end(number)
    if len(trees) > MAX_TREES:
        trees.popitem(last=False)
    return number


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little", signed=True)
