"""Names of leaves and trees, and the numbers that stand for them in a compiled program."""

import functools
import hashlib
import re
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

trees: OrderedDict[int, Any] = OrderedDict()  # tree name -> treedef, the last traced at the end
MAX_TREES = 4096


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
    containers = re.sub(r" at 0x[0-9a-f]+", "", str(treedef))
    number = _number("\n".join([*paths, containers]))
    trees[number] = treedef
    trees.move_to_end(number)
    if len(trees) > MAX_TREES:
        trees.popitem(last=False)
    return number


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little", signed=True)
