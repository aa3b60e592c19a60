"""Moments of optax's own optimizers into paged states, and back."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ._contents import Contents, Leaf, with_arrays
from ._moments import moments
from ._names import number_tree
from ._replace import replace_moments
from ._state import is_state, read_count

_KINDS = (optax.ScaleByAdamState, optax.ScaleByLionState)


def to_optax(opt_state: Any) -> Any:
    """An optimizer state with float32 moments, for optax's own optimizer.

    Each paged state becomes the `optax.ScaleByAdamState` or `optax.ScaleByLionState` with the same
    count and moments; everything else stays. What `paged_adamw8bit` made is then a state for
    `optax.adamw`, unless it rounds parameters or skips gradients by itself. It takes 8 bytes per
    parameter for Adam, on the default device.

    Args:
      opt_state: any optax state with paged states in it: the newest.

    Returns:
      The same tree with optax's states in the place of the paged ones. The parameters' residuals
      of ``param_rounding="compensated"`` are left out.

    Raises:
      As `moments`.

    Example:
      >>> import jax.numpy as jnp, optax, paged_optax
      >>> params = {"w": jnp.ones((64, 64))}
      >>> tx = paged_optax.paged_adamw8bit(1e-3)
      >>> _, state = tx.update(params, tx.init(params), params)
      >>> state = paged_optax.to_optax(state)  # for optax.adamw(1e-3).update
      >>> print(type(state[0]).__name__, state[0].count, f"{state[0].mu['w'][0, 0]:.3f}")
      ScaleByAdamState 1 0.100
    """
    return jax.tree.map(
        lambda node: _to_optax(node) if is_state(node) else node, opt_state, is_leaf=is_state
    )


def _to_optax(state: Any) -> Any:
    found = jax.tree.map(jnp.asarray, moments(state))
    if found.nu is None:
        return optax.ScaleByLionState(count=state.count, mu=found.mu)
    return optax.ScaleByAdamState(count=state.count, mu=found.mu, nu=found.nu)


def from_optax(opt_state: Any, optax_state: Any) -> Any:
    """An optimizer state with the moments, and the count, of one of optax's own optimizers.

    The first update that takes the state rounds the moments to nearest, in the format that its
    optimizer stores; until then they are kept in host memory.

    Args:
      opt_state: what the paged optimizer's `init` returned. Only its structure matters. Do not use
        it any more.
      optax_state: a state with as many `optax.ScaleByAdamState` and `optax.ScaleByLionState` in it
        as `opt_state` has paged states, or such a state itself. Moments may have any float dtype.

    Returns:
      `opt_state` with other tokens and counts.

    Raises:
      ValueError: if there is another number of states; from the first update (there also
        JaxRuntimeError), if names or shapes differ, or if moments are not finite.

    Example:
      >>> import jax.numpy as jnp, optax, paged_optax
      >>> params = {"w": jnp.ones((64, 64))}
      >>> state = optax.adamw(1e-3).init(params)  # and updated, usually
      >>> tx = paged_optax.paged_adamw8bit(1e-3)
      >>> state = paged_optax.from_optax(tx.init(params), state)
      >>> updates, state = tx.update(params, state, params)
      >>> print(state[0].count)
      1
    """
    nodes = jax.tree.leaves(optax_state, is_leaf=lambda node: isinstance(node, _KINDS))
    found = [_from_optax(node) for node in nodes if isinstance(node, _KINDS)]
    if not found:
        raise ValueError(
            f"there is no state of optax.scale_by_adam or scale_by_lion in this"
            f" {type(optax_state).__name__}"
        )
    return replace_moments(opt_state, found, convert=True)


def _from_optax(state: Any) -> Contents:
    is_adam = isinstance(state, optax.ScaleByAdamState)
    trees = {"mu": state.mu, "nu": state.nu} if is_adam else {"mu": state.mu}
    return float32_contents("adam" if is_adam else "lion", trees, read_count(state.count))


def float32_contents(rule: str, trees: dict[str, Any], count: int) -> Contents:
    """Contents in float32, of trees by the names of the rule's states."""
    pairs, treedef = jax.tree_util.tree_flatten_with_path(trees["mu"])
    names = tuple(jax.tree_util.keystr(path) for path, _ in pairs)
    leaves = {name: jax.tree.leaves(tree) for name, tree in trees.items()}
    arrays = {
        (i, 0, name): np.ascontiguousarray(np.asarray(leaf, np.float32).reshape(np.shape(leaf)))
        for name, column in leaves.items()
        for i, leaf in enumerate(column)
    }
    described = tuple(
        Leaf(name, shape, "float32", shape, ((0,) * len(shape),))
        for name, shape in zip(names, map(np.shape, leaves["mu"]), strict=True)
    )
    bare = Contents(rule, False, number_tree(names, treedef), described, _no_data, count)
    return with_arrays(bare, arrays)


def _no_data(*key: Any) -> np.ndarray:
    raise AssertionError(key)
