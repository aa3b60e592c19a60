"""Which leaves of an optimizer's state look like parameters."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax

from ._names import names_of
from ._state import has_states
from ._validate import FLOATS


@dataclasses.dataclass(frozen=True)
class Layout:
    """The leaves of an optimizer's state, some of which are paged.

    Attributes:
      leaves: shapes and dtypes of all of them, in order.
      treedef: of the state.
      owners: of each leaf, the number of the parameter that it looks like; None for others.
      paths: of the paged leaves.
    """

    leaves: tuple[jax.ShapeDtypeStruct, ...]
    treedef: Any
    owners: tuple[int | None, ...]
    paths: tuple[str, ...]

    @property
    def paged(self) -> list[int]:
        """Places of the paged leaves."""
        return [i for i, owner in enumerate(self.owners) if owner is not None]

    @property
    def others(self) -> list[int]:
        """Places of the other ones."""
        return [i for i, owner in enumerate(self.owners) if owner is None]

    def join(self, paged: Sequence[Any], others: Sequence[Any]) -> Any:
        """The state out of its leaves."""
        one, other = iter(paged), iter(others)
        chosen = [next(other if owner is None else one) for owner in self.owners]
        return jax.tree.unflatten(self.treedef, chosen)

    def others_alone(self, others: Sequence[Any]) -> Any:
        """The state with an `optax.MaskedNode` in the place of each paged leaf."""
        return self.join([optax.MaskedNode()] * len(self.paged), others)

    def paged_alone(self) -> Any:
        """The structure of the state, in which only the paged leaves are leaves."""
        return jax.tree.structure(self.join(self.paged, [None] * len(self.others)))


def find_layout(init: Callable[[Any], Any], params: Any) -> Layout:
    """The layout of the state that `init` makes for parameters.

    A leaf looks like a parameter if it is float32, bfloat16 or float16, has the parameter's shape,
    and its path ends in that of the parameter.

    Raises:
      ValueError: for a transformation that is paged itself, or has a paged one in it.
    """
    shapes = {
        tuple(path): (number, np.shape(leaf))
        for number, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(params))
    }
    state = jax.eval_shape(init, params)
    if has_states(state):
        raise ValueError(
            "paged() cannot wrap a transformation with a paged state in it, which is not in XLA's"
            " memory as it is: put it after, as optax.chain(paged(tx), paged_adamw8bit(...))"
        )
    named, treedef = jax.tree_util.tree_flatten_with_path(state)
    owners = [_owner(tuple(path), leaf, shapes) for path, leaf in named]
    names = names_of([path for path, _ in named])
    paths = [name for name, owner in zip(names, owners, strict=True) if owner is not None]
    return Layout(tuple(leaf for _, leaf in named), treedef, tuple(owners), tuple(paths))


def _owner(path: tuple[Any, ...], leaf: Any, shapes: dict[Any, Any]) -> int | None:
    if leaf.dtype not in FLOATS:
        return None
    for start in range(len(path) + 1):  # the longest path first
        number, shape = shapes.get(path[start:], (None, None))
        if number is not None and shape == leaf.shape:
            return number
    return None
