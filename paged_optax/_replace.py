"""An optimizer state with other moments in the place of its own."""

import copy
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from . import _ext
from ._contents import Contents
from ._local import local_handle, local_token
from ._state import Token, is_state, new_token, no_states, without_moments
from ._transfer import stage


def replace_moments(
    opt_state: Any, contents: Sequence[Contents | None], *, convert: bool = False
) -> Any:
    """An optimizer state with contents for each of its paged states, in tree order.

    Args:
      opt_state: any pytree with paged states in it. Only its structure matters, and where count
        and token are; shapes without values will do.
      contents: None for a state that was never updated.
      convert: see `stage`.

    Raises:
      ValueError: for another number of states.
    """
    nodes, treedef = jax.tree.flatten(opt_state, is_leaf=is_state)
    places = [i for i, node in enumerate(nodes) if is_state(node)]
    if not places:
        raise no_states(opt_state)
    if len(places) != len(contents):
        raise ValueError(
            f"there are moments of {len(contents)} paged states, and the optimizer state has"
            f" {len(places)}; was the optimizer changed?"
        )
    for i, found in zip(places, contents, strict=True):
        nodes[i] = _replace_one(nodes[i], found, convert)
    return jax.tree.unflatten(treedef, nodes)


def _replace_one(node: Any, contents: Contents | None, convert: bool) -> Any:
    """A paged state, or the mapping that stands for it, with other moments."""
    old = node if isinstance(node, Mapping) else node._asdict()
    old_token = without_moments(old["token"])
    (token,) = jax.tree.leaves(old_token)
    if contents is None and _is_fresh(token):
        return node
    if contents is None:
        value: Any = np.asarray(new_token(num_leaves=1).value)
    else:
        shared = isinstance(token, jax.Array) and not token.is_fully_addressable
        value = stage(contents, convert=convert, shared=shared)
    _give_up(token)
    return put_in(node, value, 0 if contents is None else contents.count)


def put_in(node: Any, value: np.ndarray, count: int | None) -> Any:
    """A paged state, or the mapping that stands for it, with another token and count.

    Args:
      node: only its structure matters, and where count and token are.
      value: int32 (2,).
      count: None to leave it as it is.
    """
    old = node if isinstance(node, Mapping) else node._asdict()
    token = without_moments(old["token"])
    is_token = isinstance(token, Token)  # which is not taken apart: it may have been refused
    new = jax.tree.map(lambda x: put(value, x), token.value if is_token else token)
    fields: dict[str, Any] = {"token": Token(new) if is_token else new}
    if count is not None:
        new_count = np.array(count, np.int32)
        fields["count"] = jax.tree.map(lambda x: put(new_count, x), old["count"])
    if not isinstance(node, Mapping):
        return node._replace(**fields)
    other: Any = copy.copy(node)
    other.update(fields)
    return other


def put(value: np.ndarray, like: Any) -> jax.Array:
    """The value on the devices on which `like` is, if it was put there."""
    if isinstance(like, jax.Array) and like.committed:
        return jax.make_array_from_callback(value.shape, like.sharding, lambda index: value[index])
    return jnp.asarray(value)


def _is_fresh(token: Any) -> bool:
    """Whether a token is of a state that init returned in this process."""
    if not isinstance(token, jax.Array) or isinstance(token, Tracer) or token.is_deleted():
        return False
    try:
        found = local_token(token)
    except RuntimeError:  # of a program that failed
        return False
    return found is not None and found[1] == 0 and _ext.is_alive(int(found[0]))


def _give_up(token: Any) -> None:
    """Lets go of the handle of a fresh state, once nobody has its token any more."""
    if _is_fresh(token) and (handle := local_handle(token)) is not None:
        weakref.finalize(token, _ext.forget, handle).atexit = False
