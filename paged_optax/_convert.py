"""Moments of optax's own optimizers into paged states, and back."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ._any import PagedArraysState
from ._contents import Contents, Leaf, with_arrays
from ._moments import Moments, moments
from ._names import names_of, number_tree
from ._replace import replace_moments
from ._state import find_states, is_state, read_count
from ._tables import RULES, rule_number
from ._transfer import opened


@functools.cache
def _kinds() -> dict[type, str]:
    """The rules by the states of optax that hold the same moments under the same names.

    Of a rule with several, the last is the one that `to_optax` makes. Some of them have no public
    name.
    """
    with_counts = (
        (optax.scale_by_rms(bias_correction=True), "rms"),
        (optax.scale_by_stddev(bias_correction=True), "stddev"),
    )
    return {
        optax.ScaleByAdamState: "adam",
        optax.ScaleByLionState: "lion",
        optax.TraceState: "trace",
        optax.EmaState: "ema",
        optax.contrib.MuonState: "muon",
        optax.ScaleByRmsState: "rms",
        optax.ScaleByRStdDevState: "stddev",
        optax.ScaleByRssState: "rss",
        optax.contrib.ScaleByAdemamixState: "ademamix",
        **{type(jax.eval_shape(tx.init, {})): rule for tx, rule in with_counts},
    }


def to_optax(opt_state: Any) -> Any:
    """An optimizer state with float32 moments, for optax's own optimizer.

    Each paged state becomes the state of optax's with the same count and moments, such as
    `optax.ScaleByAdamState`; everything else stays. What `paged_adamw8bit` made is then a state for
    `optax.adamw`, unless it rounds parameters or skips gradients by itself. It takes 8 bytes per
    parameter for Adam, on the default device.

    Args:
      opt_state: any optax state with paged states in it: the newest.

    Returns:
      The same tree with optax's states in the place of the paged ones. The parameters' residuals
      of ``param_rounding="compensated"`` are left out.

    Raises:
      As `moments`; NotImplementedError for Muon, whose state in optax has its coefficients too, and
      for the state of `paged`: take `moments`.

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
    (paged,) = find_states(state)
    with opened(paged.token) as contents:
        rule = contents.rule if contents else ""
    if rule == "array":
        raise _no_kind_of_optax(
            "moments(opt_state).state has its arrays in the wrapped state's tree"
        )
    if rule == "muon":
        raise NotImplementedError(
            "the state of optax.contrib.muon also has the coefficients of its iteration, which are"
            " not known here. Put moments(opt_state).mu into a state that its init returned."
        )
    kind: Any = [kind for kind, name in _kinds().items() if name == rule][-1]
    values = {name: getattr(found, name) for name in kind._fields if name in Moments._fields}
    counts = {name: state.count for name in kind._fields if name.startswith("count")}
    return kind(**values, **counts)


def _no_kind_of_optax(way_out: str) -> NotImplementedError:
    return NotImplementedError(
        "the state of paged(tx) has the arrays of any transformation, which belong to no one state"
        f" of optax: {way_out}"
    )


def from_optax(opt_state: Any, optax_state: Any) -> Any:
    """An optimizer state with the moments, and the count, of one of optax's own optimizers.

    The first update that takes the state rounds the moments to nearest, in the format that its
    optimizer stores; until then they are kept in host memory.

    Args:
      opt_state: what the paged optimizer's `init` returned. Only its structure matters. Do not use
        it any more.
      optax_state: a state with as many states of optax's optimizers in it (`to_optax` has examples)
        as `opt_state` has paged states, or such a state itself. Moments may have any float dtype.
        Where optax keeps no count, that of `opt_state` stays.

    Returns:
      `opt_state` with other tokens and counts.

    Raises:
      ValueError: if there is another number of states; from the first update (there also
        JaxRuntimeError), if names or shapes differ, or if moments are not finite.
      NotImplementedError: for a state of `paged`.

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
    targets = jax.tree.leaves(opt_state, is_leaf=is_state)
    if any(isinstance(node, PagedArraysState) for node in targets):
        raise _no_kind_of_optax(
            "begin with its init(params), or take the paged optimizer of that state"
            " (docs/optimizers.md)"
        )
    kinds = tuple(_kinds())
    nodes = jax.tree.leaves(optax_state, is_leaf=lambda node: isinstance(node, kinds))
    found = [_from_optax(node) for node in nodes if isinstance(node, kinds)]
    if not found:
        raise ValueError(
            "there is no state of optax.scale_by_adam, scale_by_lion or another optimizer that has"
            f" a paged form in this {type(optax_state).__name__}"
        )
    return replace_moments(opt_state, found, convert=True)


def _from_optax(state: Any) -> Contents:
    rule = _kinds()[type(state)]
    trees = {name: getattr(state, name) for name, _ in RULES[rule_number(rule)]["states"]}
    has_count = "count" in state._fields  # every tuple has a method of this name
    return float32_contents(rule, trees, read_count(state.count) if has_count else None)


def float32_contents(rule: str, trees: dict[str, Any], count: int | None) -> Contents:
    """Contents in float32, of trees by the names of the rule's states."""
    first = next(iter(trees))
    pairs, treedef = jax.tree_util.tree_flatten_with_path(trees[first])
    names = names_of([path for path, _ in pairs])
    leaves = {name: jax.tree.leaves(tree) for name, tree in trees.items()}
    arrays = {
        (i, 0, name): np.ascontiguousarray(np.asarray(leaf, np.float32).reshape(np.shape(leaf)))
        for name, column in leaves.items()
        for i, leaf in enumerate(column)
    }
    described = tuple(
        Leaf(name, shape, "float32", shape, ((0,) * len(shape),))
        for name, shape in zip(names, map(np.shape, leaves[first]), strict=True)
    )
    bare = Contents(rule, False, number_tree(names, treedef), described, _no_data, count)
    return with_arrays(bare, arrays)


def _no_data(*key: Any) -> np.ndarray:
    raise AssertionError(key)
