"""Moments of paged states as bitsandbytes' 8-bit optimizers have them: see `_bitsandbytes`."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from . import _reference as reference
from ._bitsandbytes import NESTED, SIGNED, check_known, find_keys
from ._contents import Contents
from ._moments import decode_leaf
from ._state import find_states, read_count
from ._tables import RULES, rule_number
from ._transfer import opened

_THEIRS = ("adam", "lion", "trace", "rms", "rss")  # rules, with state1 and perhaps state2
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
    NumPy. Leaves with fewer than 4,096 elements become float32, as in bitsandbytes.

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
    count = read_count(states[0].count)
    with opened(states[0].token) as contents:
        if contents is None:
            raise ValueError("this optimizer state was never updated: there are no moments yet")
        if contents.rule not in _THEIRS:
            raise ValueError(
                f"bitsandbytes has no optimizer with the states of the rule {contents.rule!r}, or"
                f" keeps them in another way; there are {', '.join(_THEIRS)}"
            )
        paths = [leaf.name for leaf in contents.leaves]
        pairs = list(names.items() if isinstance(names, Mapping) else enumerate(names))
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
    states = RULES[rule_number(contents.rule)]["states"]
    is_small = int(np.prod(leaf.shape)) < _MIN_8BIT_SIZE
    is_verbatim = leaf.num_boxes == 1 and not is_transposed and not is_small
    tensors: dict[str, np.ndarray] = {}
    if leaf.format == "dynamic" and is_verbatim:
        fields = {field.name: field for field in contents.fields(leaf)}
        for number, (name, _) in enumerate(states, 1):
            tensors[f"state{number}"] = contents.read(i, 0, fields[name])
            tensors[f"absmax{number}"] = contents.read(i, 0, fields[f"{name}_scale"])
    else:
        values = decode_leaf(contents, i)
        for number, ((name, _), signed) in enumerate(zip(states, SIGNED, strict=False), 1):
            value = values[name].T if is_transposed else values[name]
            tensors[f"state{number}"] = np.ascontiguousarray(value).reshape(value.shape)
            if not is_small:
                stored = reference.quantize(value.ravel(), signed)
                tensors[f"state{number}"] = stored.codes[: value.size].reshape(value.shape)
                tensors[f"absmax{number}"] = stored.scales
    if not is_small:
        for number in range(1, len(states) + 1):
            tensors[f"qmap{number}"] = reference.dynamic_map(SIGNED[number - 1]).copy()
    return {"step": count, NESTED: tensors} if nested else {"step": count, **tensors}
