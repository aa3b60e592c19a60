"""Moments of paged states as bitsandbytes' 8-bit optimizers have them: see `_bitsandbytes`."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from . import _reference as reference
from ._bitsandbytes import NESTED, check_known, find_keys
from ._bitsandbytes_entry import OPTIMIZERS, SIGNED, tensors_of
from ._contents import BLOCK, Contents
from ._moments import decode_leaf
from ._refused import tell_refusals
from ._state import find_states, read_count, read_token
from ._transfer import opened

_MIN_8BIT_SIZE = 4096  # of bitsandbytes: smaller parameters have float32 moments


def to_bitsandbytes(
    opt_state: Any,
    names: Sequence[str] | Mapping[Any, str],
    *,
    transposed: Collection[str] = (),
    nested: bool = True,
) -> dict[str, Any]:
    """The moments of an optimizer state as an optimizer of bitsandbytes has them.

    ``optimizer.load_state_dict(optimizer.state_dict() | theirs)`` takes the result, once its arrays
    are tensors: ``jax.tree.map(torch.from_numpy, ...)``. What is stored in ``"dynamic"`` on one
    device, and not transposed, keeps all bits. Everything else is rounded once, to nearest, in
    NumPy. Leaves with fewer than 4,096 elements become float32, as in bitsandbytes. So do leaves of
    AdEMAMix whose size is no multiple of 256: in 8 bits bitsandbytes would mix up their scales.

    Args:
      opt_state: any optax state, nnx.Optimizer or TrainState with one paged state in it: the
        newest, and updated at least once.
      names: as in `from_bitsandbytes`: the path of each parameter of bitsandbytes, or a mapping.
      transposed: as in `from_bitsandbytes`.
      nested: whether tensors are nested as from bitsandbytes 0.49.2 on.

    Returns:
      ``{"state": ...}``, with arrays of NumPy. Residuals of ``param_rounding="compensated"`` are
      left out.

    Raises:
      ValueError: if there are several paged states, or one that was never updated; if `names` are
        not those of its leaves.
      RuntimeError: if the state is not the newest one, or was released, or is partly in other
        processes.
      NotImplementedError: if it is not known which part of the parameters each device has.

    Example:
      >>> import jax.numpy as jnp, paged_optax
      >>> tx = paged_optax.paged_adamw8bit(1e-3, quantization=paged_optax.Quantization("dynamic"))
      >>> params = {"w": jnp.ones((64, 64))}
      >>> _, state = tx.update(params, tx.init(params), params)
      >>> theirs = paged_optax.to_bitsandbytes(state, ["['w']"], nested=False)
      >>> print(theirs["state"][0]["step"], theirs["state"][0]["state1"].dtype)
      1 uint8

    References:
      Dettmers et al., `8-bit Optimizers via Block-wise Quantization
      <https://arxiv.org/abs/2110.02861>`_, 2022
    """
    states = find_states(opt_state)
    if len(states) != 1:
        raise ValueError(f"found {len(states)} paged states; pass one of them")
    read_token(states[0])
    tell_refusals()
    count = read_count(states[0].count)
    # Copies: steps wait for what follows, so it runs no code of the user.
    if not isinstance(names, str):
        names = dict(names) if isinstance(names, Mapping) else list(names)
    if not isinstance(transposed, str):
        transposed = frozenset(transposed)
    pairs = list(names.items() if isinstance(names, Mapping) else enumerate(names))
    with opened(states[0].token) as contents:
        if contents is None:
            raise ValueError("this optimizer state was never updated: there are no moments yet")
        if contents.rule not in OPTIMIZERS:
            raise ValueError(
                f"bitsandbytes has no optimizer with the states of the rule {contents.rule!r}; it"
                f" has {', '.join(OPTIMIZERS.values())}"
            )
        paths = [leaf.name for leaf in contents.leaves]
        keys = find_keys(names, paths, {key: {} for key, _ in pairs})
        check_known("transposed", transposed, paths)
        state = {
            keys[path]: _write_entry(contents, i, path in transposed, count, nested)
            for i, path in enumerate(paths)
        }
    return {"state": {key: state[key] for key, _ in pairs}}


def _write_entry(
    contents: Contents, i: int, is_transposed: bool, count: int, nested: bool
) -> dict[str, Any]:
    """What bitsandbytes keeps of one parameter."""
    leaf = contents.leaves[i]
    if len(leaf.starts) != leaf.num_boxes:
        raise RuntimeError(
            f"{leaf.name}: {leaf.num_boxes - len(leaf.starts)} of its {leaf.num_boxes} parts are in"
            " other processes; save_moments there, and load_moments in one process"
        )
    theirs = tensors_of(contents.rule)
    size = int(np.prod(leaf.shape))
    is_wide = size < _MIN_8BIT_SIZE or (contents.rule == "ademamix" and size % BLOCK > 0)
    is_verbatim = leaf.format == "dynamic" and leaf.num_boxes == 1 and not is_transposed
    if is_verbatim and not is_wide:
        fields = [field for field in contents.fields(leaf) if field.name != "residual"]
        arrays = {field.name: contents.read(i, 0, field) for field in fields}
    else:
        values = decode_leaf(contents, i)
        arrays = {
            name: value.T.copy() if is_transposed else value for name, value in values.items()
        }
        if not is_wide:
            arrays = _quantize(arrays, theirs)
    tensors: dict[str, np.ndarray] = {}
    for number, names in enumerate(theirs, 1):
        tensors[f"state{number}"] = _together(arrays, names)
        if not is_wide:
            tensors[f"absmax{number}"] = _together(arrays, [f"{name}_scale" for name in names])
            tensors[f"qmap{number}"] = reference.dynamic_map(SIGNED[number - 1]).copy()
    return {"step": count, NESTED: tensors} if nested else {"step": count, **tensors}


def _quantize(values: dict[str, np.ndarray], theirs: list[list[str]]) -> dict[str, np.ndarray]:
    """Codes and scales of values, by the names of fields."""
    arrays = {}
    for names, signed in zip(theirs, SIGNED, strict=False):
        for name in names:
            stored = reference.quantize(values[name].ravel(), signed)
            arrays[name] = stored.codes[: values[name].size].reshape(values[name].shape)
            arrays[f"{name}_scale"] = stored.scales
    return arrays


def _together(arrays: dict[str, np.ndarray], names: list[str]) -> np.ndarray:
    """The one array of these names, or a stack of them."""
    return arrays[names[0]] if len(names) == 1 else np.stack([arrays[name] for name in names])
