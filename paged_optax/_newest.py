"""A way back to the newest state, for whoever has an older one."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from . import _ext
from ._refused import StateRefused
from ._replace import put, put_in
from ._state import PagedState, as_state, is_state, no_states, read_anyway
from ._states import StateInfo, states
from ._watch import await_steps


def newest(opt_state: Any, *, of: Sequence[StateInfo] | None = None) -> Any:
    """The newest optimizer state of the training that a state belongs to.

    Moments change in place, so only the newest state can be updated. It is lost if the program is
    interrupted after a step and before the step's result is assigned (Ctrl-C), if something raises
    after the update in the same function or program, or if a notebook cell runs again. Its moments
    are not lost, and this finds them.

    Waits for the steps under way. It forgets refused steps of the state: they raise nothing more.

    The parameters are whichever you have. If they are those of the step before, the next update
    uses moments that are one step ahead of them, which does no harm. Parameters that were donated
    to the interrupted call are gone, as with any optimizer.

    Args:
      opt_state: any optax state with paged states in it, of whatever version: a chain, states of
        `optax.masked`, `optax.partition` and `MultiSteps`, a TrainState. Of an nnx.Optimizer pass
        ``optimizer.opt_state``.
      of: for an `opt_state` that was donated, or is of a program that failed, so that nothing in
        it can be read: which states it is, one entry of `states` for each paged state, in tree
        order. It is not needed where this process has one state alone.

    Returns:
      The same tree with the newest tokens, and with their counts. Counts elsewhere in the tree that
      were equal, such as those of schedules, go with them. All else is returned as it was given.

    Raises:
      ValueError: if there is no paged state; if it cannot be read, and it is not clear which it
        was; if something else in the tree cannot be read.
      StateRefused: if the moments were released or are not in this process, if the state is of an
        earlier training, which a step from its initial state ended, or if the devices have
        different moments.

    Example:
      >>> import jax.numpy as jnp, paged_optax
      >>> tx = paged_optax.paged_adamw8bit(1e-3)
      >>> params = {"w": jnp.ones((64, 64))}
      >>> _, opt_state = tx.update(params, tx.init(params), params)
      >>> _ = tx.update(params, opt_state, params)  # the new state is lost
      >>> opt_state = paged_optax.newest(opt_state)
      >>> print(opt_state[0].count)
      2
    """
    await_steps()
    leaves, treedef = jax.tree_util.tree_flatten_with_path(opt_state, is_leaf=is_state)
    paths, nodes = [path for path, _ in leaves], [node for _, node in leaves]
    places = [i for i, node in enumerate(nodes) if is_state(node)]
    if not places:
        raise no_states(opt_state)
    found = [state for i in places if (state := as_state(nodes[i]))]
    handles = _donated_handles(found, of)
    old_counts, new_counts = set(), set()
    for i, state, handle in zip(places, found, handles, strict=True):
        version, count = _find(state, handle)
        if not _is_gone(state.count):
            old_counts.add(int(np.asarray(_first(state.count))))
            count = int(np.asarray(_first(state.count))) if count is None else count
        elif count is None:
            raise ValueError(f"the count of {_name(paths[i])} is gone, and is not known")
        new_counts.add(count)
        token = np.array([handle or read_anyway(state)[0], version], np.int32)
        nodes[i] = put_in(nodes[i], token, count)
    _move_counts(nodes, paths, places, old_counts, new_counts)
    return jax.tree.unflatten(treedef, nodes)


def _donated_handles(
    found: Sequence[PagedState], of: Sequence[StateInfo] | None
) -> list[int | None]:
    """Of each state the handle, if its token cannot be read."""
    if of is not None:
        if len(of) != len(found):
            raise ValueError(f"of has {len(of)} entries, and there are {len(found)} paged states")
        return [entry.handle for entry in of]
    gone = [_is_gone(state.token) for state in found]
    if not any(gone):
        return [None] * len(found)
    alive = [entry for entry in states() if entry.version]
    if len(found) > 1 or len(alive) != 1:
        lines = "\n".join(f"  {entry}" for entry in alive)
        raise ValueError(
            "this optimizer state was donated to a program, or is of one that failed, so nothing"
            " tells which it is. Pass the entries of paged_optax.states() that it is, one for each"
            f" paged state: newest(opt_state, of=[...]). There are {len(alive)}:\n{lines}"
        )
    return [alive[0].handle]


def _find(state: PagedState, handle: int | None) -> tuple[int, int | None]:
    """The version of the newest contents, and their count if it is known."""
    version = None
    if handle is None:
        handle, version = read_anyway(state)
    _ext.forget_refused(handle)
    newest = _ext.newest(handle)
    if newest is None:
        _ext.describe(handle, version or 1)  # raises what there is to say
        raise StateRefused("paged_optax: the moments of this optimizer state are not known")
    if version and version != newest[3] and version < newest[2]:
        raise StateRefused(
            "paged_optax: this optimizer state is of an earlier training, whose moments ended when"
            " its initial state was updated again: it has version"
            f" {version}, and the training since began with {newest[2]}. Go on from the state that"
            " came after that, or from a new init(params)."
        )
    return newest[:2]


def _first(tree: Any) -> Any:
    """The array in what stands for one."""
    (leaf,) = jax.tree.leaves(tree)
    return leaf


def _is_gone(tree: Any) -> bool:
    """Whether an array was donated, or comes from a program that failed."""
    array = _first(tree)
    if not isinstance(array, jax.Array) or isinstance(array, Tracer):
        return False
    try:
        array.block_until_ready()
    except RuntimeError:
        return True
    return array.is_deleted()


def _move_counts(
    nodes: list[Any], paths: list[Any], places: list[int], old: set[int], new: set[int]
) -> None:
    """Sets counts elsewhere in the tree that were equal to those of the paged states."""
    for i, node in enumerate(nodes):
        if i in places or not isinstance(node, jax.Array):
            continue
        if isinstance(node, Tracer):
            continue
        is_count = node.shape == () and node.dtype == jnp.int32 and _is_count(paths[i])
        is_gone = _is_gone(node)
        if is_count and len(new) == 1 and (is_gone or {int(node)} == old):
            nodes[i] = put(np.array(next(iter(new)), np.int32), node)
        elif is_gone:
            raise ValueError(
                f"{_name(paths[i])} of the optimizer state was donated to a program, or is of one"
                " that failed, and is gone. Paged states come back; the rest has to come from a"
                " copy, or from init(params)."
            )


def _is_count(path: Any) -> bool:
    """Whether a leaf is called `count`; it may be the value of an nnx.Variable of that name."""
    return "count" in [getattr(key, "name", getattr(key, "key", "")) for key in path[-2:]]


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path)
