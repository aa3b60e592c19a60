"""Zero moments for some elements: dead neurons, pruned heads, new tokens of a vocabulary."""

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from . import _ext
from . import _reference as reference
from ._any import PagedArraysState
from ._contents import BLOCK, Contents, Leaf, Shape, with_arrays
from ._holding import holding
from ._names import is_by_place, names_of
from ._refused import tell_refusals
from ._replace import put_in
from ._state import as_state, is_state, no_states, read_handle
from ._tables import RULES, rule_number
from ._transfer import find_staged, stage

Masks = list[tuple[str, np.ndarray]]  # by path


def reset(opt_state: Any, where: Any = True) -> Any:
    """Sets moments to zero: of everything, of whole leaves, of rows, or of any elements.

    Use it for parameters that begin anew, such as neurons that were dead and were drawn again, or
    rows of an embedding for tokens that are new. The moments stay where they are, in the memory of
    a GPU or of the host, and take no more room. All other elements keep what is stored of them, to
    the bit: the scale of a block stays as it is, and in the ``"ratio"`` format the block gets a
    code for zero if it had none. Only a block of which every element is reset starts with the scale
    of zeros. Residuals of compensated parameters stay, since they belong to the parameters.

    Waits for the steps under way, and brings the leaves with a mask to the host, one device after
    the other. It is as an update: the state that you pass cannot be used any more. With several
    processes (`jax.distributed`) all must make this call with the same masks.

    The count stays as it is, so the bias corrections do not begin anew. The first step of an
    element that was reset is larger than the learning rate, by up to ``(1 - b1) / sqrt(1 - b2)``
    (Adam; 3.2 with the default decay rates), and comes down within some tens of steps.

    Args:
      opt_state: any optax state with paged states in it: the newest. Of an nnx.Optimizer pass
        ``optimizer.opt_state``. The arrays of `paged` have the tree of the wrapped state, as
        ``moments(opt_state).state`` shows it; name those that begin at zero.
      where: a tree of masks in the parameters' tree, or a prefix of it. A mask is True or False, or
        an array of bool that broadcasts to the shape of the parameter: of shape (n, 1) for rows.
        Leaves that the tree does not have, or has None for, are left alone.

    Returns:
      The state to go on with, which has the same count.

    Raises:
      ValueError: if there is no paged state; for a mask that does not broadcast to its parameter,
        or whose parameter no paged state has; for a mask of the whole tree and a state of `paged`,
        some arrays of which may not begin at zero.
      TypeError: for a mask that is not of bool.
      StateRefused: if the state is not the newest one, was released, or is not in this process.
      NotImplementedError: for a mask of single elements where it is not known which part of the
        parameters each device has.

    Example:
      >>> import jax.numpy as jnp, paged_optax
      >>> tx = paged_optax.paged_adamw8bit(1e-3)
      >>> params = {"embed": jnp.ones((100, 64)), "hidden": {"w": jnp.ones((64, 128))}}
      >>> _, state = tx.update(params, tx.init(params), params)

      Neurons 3 and 7 of the hidden layer were dead; tokens from 90 on are new:

      >>> dead = jnp.zeros(128, bool).at[jnp.array([3, 7])].set(True)
      >>> new = jnp.arange(100)[:, None] >= 90
      >>> state = paged_optax.reset(state, {"embed": new, "hidden": {"w": dead}})
      >>> mu = paged_optax.moments(state).mu
      >>> print(mu["hidden"]["w"][0, 2:5].round(2), mu["embed"][88:92, 0].round(2))
      [0.1 0.  0.1] [0.1 0.1 0.  0. ]

    .. note::
      ``jax.tree.map(jnp.zeros_like, opt_state)`` cannot reset a paged state: it makes a token of
      zeros, which names no moments, and an update refuses it. ``reset(opt_state)`` does.
    """
    masks = _masks(where)
    nodes, treedef = jax.tree.flatten(opt_state, is_leaf=is_state)
    places = [i for i, node in enumerate(nodes) if is_state(node)]
    if not places:
        raise no_states(opt_state)
    used: set[str] = set()
    plans = []
    for i in places:
        state = as_state(nodes[i])
        assert state is not None
        handle, version = read_handle(state.token)
        tell_refusals()
        plans.append((i, handle, version, _plan(handle, version, masks, used)))
    if missing := [path for path, mask in masks if mask.any() and path not in used]:
        if any(plan is not None for *_, plan in plans):
            hint = ". " + _WAY_OUT if any(map(_is_of_any, nodes)) else ""
            raise ValueError(
                f"where has a mask for {missing[0] or 'the whole tree'}, and no paged state has"
                f" such a parameter with moments{hint}"
            )
    for i, handle, version, plan in plans:
        if plan is not None:
            nodes[i] = put_in(nodes[i], _carry_out(handle, version, plan), None)
    return jax.tree.unflatten(treedef, nodes)


_WAY_OUT = (
    "The arrays of paged(tx) have the tree of the wrapped state, as moments(opt_state).state shows"
    " it: pass masks in that tree, for the arrays that begin at zero"
)


def _is_of_any(node: Any) -> bool:
    return isinstance(node, PagedArraysState)


def _refuse_all_of_any(rule: str, masks: Masks) -> None:
    """Zero is not where all arrays of any transformation begin."""
    if rule == "array" and any(path == "" and mask.any() for path, mask in masks):
        raise ValueError(
            "arrays of paged(tx) may begin with other values than zero (the first parameters of"
            f" madgrad, for example), so they are not all set to zero. {_WAY_OUT}. To begin anew"
            " make a new state with init(params), after paged_optax.release(opt_state)"
        )


def _masks(where: Any) -> Masks:
    masks = []
    pairs = jax.tree_util.tree_leaves_with_path(where)
    names = names_of([path for path, _ in pairs])
    for name, (_, mask) in zip(names, pairs, strict=True):
        array = np.asarray(mask)
        if array.dtype != np.bool_:
            raise TypeError(
                f"the mask {name or 'where'} is {array.dtype}{list(array.shape)}, and must be of"
                " bool"
            )
        masks.append((name, array))
    return masks


def _mask_of(masks: Masks, name: str, shape: Shape, used: set[str]) -> np.ndarray | None:
    """The mask of a leaf of this shape; None if nothing is to be reset."""
    for path, mask in masks:
        if not (name.startswith(path) and name[len(path) :][:1] in ("", "[", ".")):
            continue
        used.add(path)
        try:
            mask = np.broadcast_to(mask, shape)
        except ValueError:
            raise ValueError(
                f"the mask {path or 'where'} has shape {mask.shape}, which does not broadcast to"
                f" {name or 'the parameter'} of shape {tuple(shape)}"
            ) from None
        return mask if mask.any() else None
    if is_by_place(name) and any(is_by_place(path) for path, _ in masks):
        raise ValueError(
            "keys without a text of their own, such as objects without __repr__, are told apart by"
            f" their places in the tree (#0 is the first), so where needs a mask for each of them,"
            f" and has none for {name}. False resets nothing"
        )
    return None


# What to do: other contents for a state that waits for its first update; or, by device, what to
# write there.
_Plan = Contents | list[tuple[str, int, list[tuple[int, list[np.ndarray], list[np.ndarray]]]]]


def _plan(handle: int, version: int, masks: Masks, used: set[str]) -> _Plan | None:
    """What to do with a state; None for one that was never updated."""
    staged = find_staged(handle, version)
    if staged is not None:
        return _reset_staged(staged, masks, used)
    reports = _ext.describe(handle, version)
    if version == 0 or not any(report["version"] for report in reports):
        return None
    plan = []
    for report in reports:
        device = report["platform"], report["ordinal"]
        with holding(), contextlib.closing(_ext.snapshot(*device, handle, version)) as snapshot:
            plan.append((*device, _reset_device(snapshot, masks, used)))
    return plan


def _carry_out(handle: int, version: int, plan: _Plan) -> np.ndarray:
    """Does it; returns the new token."""
    if isinstance(plan, Contents):
        convert = bool((_ext.staged(handle) or {}).get("convert"))
        token = stage(plan, convert=convert, shared=jax.process_count() > 1)
        _ext.release(handle)
        return token
    versions = {
        _ext.rewrite(platform, ordinal, handle, version, leaves)
        for platform, ordinal, leaves in plan
    }
    return np.array([handle, versions.pop()], np.int32)


def _reset_device(
    snapshot: Any, masks: Masks, used: set[str]
) -> list[tuple[int, list[np.ndarray], list[np.ndarray]]]:
    """What the leaves of one device with a mask are to have."""
    _refuse_all_of_any(snapshot.rule, masks)
    leaves = []
    boxes = snapshot.boxes
    for i, (format, shape) in enumerate(zip(snapshot.formats, snapshot.shapes, strict=True)):
        whole, start = (shape, (0,) * len(shape)) if boxes is None else boxes[i]
        name = snapshot.names[i] if snapshot.names else ""
        mask = _mask_of(masks, name, tuple(whole), used)
        if mask is None:
            continue
        if boxes is None and not mask.all():
            raise NotImplementedError(
                "it is not known which part of the parameters each device has (the state was"
                " updated inside jax.shard_map or jax.pmap, or on a mesh with axes of several"
                " types), so only whole leaves can be reset"
            )
        mask = mask[_index(start, shape)]
        if mask.any():
            codes, words, _ = snapshot.read(i)
            stored = _reset_leaf(snapshot.rule, format, codes, words, mask)
            leaves.append((i, *(list(map(_bytes, arrays)) for arrays in stored)))
    return leaves


def _index(start: Sequence[int], shape: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(at, at + size) for at, size in zip(start, shape, strict=True))


def _bytes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(np.uint8)


def _reset_leaf(
    rule: str,
    format: str,
    codes: Sequence[np.ndarray],
    words: Sequence[np.ndarray],
    mask: np.ndarray,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Codes, padded to whole blocks, and words of a leaf or box after its reset."""
    signed = [role == "signed" for _, role in RULES[rule_number(rule)]["states"]]
    missing = -mask.size % BLOCK
    flat = np.pad(mask.ravel(), (0, missing), constant_values=True)
    padded = [np.pad(array.ravel(), (0, missing)) for array in codes]
    stored = reference.from_arrays(format, [*padded, *words], signed)
    return reference.to_arrays(reference.reset(stored, signed, flat))


def _reset_staged(contents: Contents, masks: Masks, used: set[str]) -> Contents:
    """Contents with some elements reset."""
    _refuse_all_of_any(contents.rule, masks)
    arrays = {
        (i, b, field.name): contents.data(i, b, field.name) for i, b, field in contents.keys()
    }
    for i, leaf in enumerate(contents.leaves):
        mask = _mask_of(masks, leaf.name, leaf.shape, used)
        if mask is None:
            continue
        for b, start in enumerate(leaf.starts):
            part = mask[_index(start, leaf.box)]
            if part.any():
                arrays.update(_reset_box(contents, i, b, leaf, part))
    return with_arrays(contents, arrays)


def _reset_box(
    contents: Contents, i: int, b: int, leaf: Leaf, mask: np.ndarray
) -> dict[tuple[int, int, str], np.ndarray]:
    fields = [field for field in contents.fields(leaf) if field.name != "residual"]
    codes = [contents.read(i, b, field) for field in fields if not field.is_per_block]
    words = [contents.read(i, b, f).view(np.float32) for f in fields if f.is_per_block]
    stored = _reset_leaf(contents.rule, leaf.format, codes, words, mask)
    new = {}
    for field, array in zip(fields, [*stored[0], *stored[1]], strict=True):
        shape = field.shape(leaf.box)
        new[i, b, field.name] = array[: math.prod(shape)].view(field.dtype).reshape(shape)
    return new
