"""Moments of bitsandbytes' 8-bit optimizers into paged states.

A state dict of bitsandbytes has, by the place of a parameter in the optimizer, its step and the
tensors of each moment: ``state1`` and ``state2`` in the parameter's shape, uint8 with ``qmap1``
(the map of the codes) and ``absmax1`` (a scale for 256 elements), or float32 for small parameters.
From 0.49.2 on these tensors are nested once more, in ``__bnb_optimizer_quant_state__``.

Everything here works on NumPy arrays. Tensors of torch are asked to become such, so that torch is
needed only by those who have it.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from . import _reference as reference
from ._contents import BLOCK, Contents, Leaf, with_arrays
from ._moments import decode_leaf
from ._names import number_tree
from ._replace import replace_moments

NESTED = "__bnb_optimizer_quant_state__"
SIGNED = (True, False)  # of state1 and state2


def from_bitsandbytes(
    opt_state: Any,
    state_dict: Mapping[Any, Any],
    params: Any,
    names: Sequence[str] | Mapping[Any, str],
    *,
    transposed: Collection[str] = (),
) -> Any:
    """An optimizer state with the moments, and the count, of an optimizer of bitsandbytes.

    For `Adam8bit`, `AdamW8bit` and `Lion8bit`, paged or not, and their 32-bit forms. An optimizer
    with ``Quantization("dynamic")`` goes on with the same bits. Other formats, and transposed
    leaves, are rounded once, to nearest, by the first update that takes the state.

    Args:
      opt_state: what the paged optimizer's `init` returned, with one paged state in it. Only its
        structure matters. Do not use it any more.
      state_dict: what ``optimizer.state_dict()`` returned, or the mapping ``"state"`` in it, with
        arrays of NumPy or tensors of torch. From a safetensors file: tensors by the names that the
        path to them gives, joined with dots, such as ``state.0.state1``.
      params: the parameters of the optimizer; arrays or shapes.
      names: of each parameter of bitsandbytes, in the order in which its optimizer got them (that
        of its ``param_groups``, one after the other), the path of the same parameter in `params` as
        `jax.tree_util.keystr` gives it. Or a mapping from keys of `state_dict` to such paths.
      transposed: paths of the leaves that are the transposed parameters of torch: kernels of Flax
        are ``torch.nn.Linear``'s weights transposed.

    Returns:
      `opt_state` with another token and count.

    Raises:
      ValueError: if a parameter is missing, or there twice, or of another shape; if it was not
        quantized in blocks of 256 with the map that `Quantization("dynamic")` has; if parameters
        have seen different numbers of steps; if there is another number of paged states. From the
        first update (there also JaxRuntimeError): if scales or moments are not finite.
      TypeError: for arrays of other dtypes.

    Example:
      >>> import jax.numpy as jnp, paged_optax
      >>> tx = paged_optax.paged_adamw8bit(1e-3, quantization=paged_optax.Quantization("dynamic"))
      >>> params = {"w": jnp.ones((64, 64))}
      >>> _, state = tx.update(params, tx.init(params), params)
      >>> theirs = paged_optax.to_bitsandbytes(state, ["['w']"])  # or what torch.load returned
      >>> state = paged_optax.from_bitsandbytes(tx.init(params), theirs, params, ["['w']"])
      >>> _, state = tx.update(params, state, params)
      >>> print(state[0].count)
      2

    References:
      Dettmers et al., `8-bit Optimizers via Block-wise Quantization
      <https://arxiv.org/abs/2110.02861>`_, 2022
    """
    entries = _entries_of(state_dict)
    pairs, treedef = jax.tree_util.tree_flatten_with_path(params)
    paths = tuple(jax.tree_util.keystr(path) for path, _ in pairs)
    keys = find_keys(names, paths, entries)
    check_known("transposed", transposed, paths)
    if not paths:
        raise ValueError("params has no leaves; pass the parameters of the optimizer")
    found = [
        _read_entry(path, np.shape(leaf), entries[keys[path]], path in transposed)
        for path, (_, leaf) in zip(paths, pairs, strict=True)
    ]
    steps = {path: count for path, (*_, count) in zip(paths, found, strict=True)}
    if len(set(steps.values())) > 1:
        low, high = min(steps, key=steps.__getitem__), max(steps, key=steps.__getitem__)
        raise ValueError(
            f"parameters have seen different numbers of steps: {low} {steps[low]} and {high}"
            f" {steps[high]}; one state has one count. Keep them in states of their own"
            " (optax.partition)."
        )
    rules = {"lion" if "nu" not in arrays else "adam" for _, arrays, _ in found}
    if len(rules) != 1:
        raise ValueError(
            "some parameters have a state2 and some do not; convert one optimizer at a time"
        )
    leaves = tuple(leaf for leaf, _, _ in found)
    count = next(iter(steps.values()))
    contents = Contents(rules.pop(), False, number_tree(paths, treedef), leaves, _none, count)
    arrays = {(i, 0, k): a for i, (_, arrays, _) in enumerate(found) for k, a in arrays.items()}
    return replace_moments(opt_state, [with_arrays(contents, arrays)], convert=True)


def _none(*key: Any) -> np.ndarray:
    raise AssertionError(key)


def _entries_of(state_dict: Mapping[Any, Any]) -> dict[Any, dict[str, Any]]:
    """What there is of each parameter, by its key: one flat dict, in whatever layout it comes."""
    state = state_dict.get("state", state_dict) if isinstance(state_dict, Mapping) else None
    if not isinstance(state, Mapping):
        raise TypeError(
            f"state_dict is a {type(state_dict).__name__}; it must be what optimizer.state_dict()"
            " returned, or a dict of arrays by name"
        )
    entries: dict[Any, dict[str, Any]] = {}
    for key, value in state.items():
        if isinstance(value, Mapping):
            inner = value.get(NESTED, {})
            if not isinstance(inner, Mapping):
                raise TypeError(f"parameter {key!r}: {NESTED} is a {type(inner).__name__}, no dict")
            entries[key] = {k: v for k, v in value.items() if k != NESTED} | dict(inner)
        elif isinstance(key, str) and "." in key:  # of a flat file
            path, field = key.removeprefix("state.").rsplit(".", 1)
            entries.setdefault(path.removesuffix(f".{NESTED}"), {})[field] = value
    if not entries:
        raise ValueError(
            "there is no state of a parameter in state_dict (was it saved before the first step?)"
        )
    return entries


def find_keys(
    names: Sequence[str] | Mapping[Any, str],
    paths: Sequence[str],
    entries: dict[Any, dict[str, Any]],
) -> dict[str, Any]:
    """The key in the state dict of each leaf."""
    if isinstance(names, str):
        raise TypeError(f"names is {names!r}; it must be a sequence of names, or a mapping")
    pairs = list(names.items() if isinstance(names, Mapping) else enumerate(names))
    keys = {path: key for key, path in pairs}
    if len(keys) != len(pairs):
        twice = next(path for key, path in pairs if keys[path] != key)
        raise ValueError(f"names has {twice} twice; each leaf has one parameter of bitsandbytes")
    check_known("names", keys, paths)
    for path in paths:
        if path not in keys:
            raise ValueError(f"names does not say which parameter of bitsandbytes {path} is")
        if keys[path] not in entries and str(keys[path]) in entries:
            keys[path] = str(keys[path])  # text, in files
        if keys[path] not in entries:
            raise ValueError(
                f"state_dict has no parameter {keys[path]!r}, which is {path}; it has"
                f" {_list(map(repr, entries))}"
            )
    return keys


def check_known(what: str, names: Collection[str], paths: Sequence[str]) -> None:
    if isinstance(names, str):
        raise TypeError(f"{what} is {names!r}; it must be a collection of names")
    for name in names:
        if name not in paths:
            raise ValueError(f"{what} has {name!r}, which is no leaf; there are {_list(paths)}")


def _list(names: Any) -> str:
    names = list(names)
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _read_entry(
    path: str, shape: tuple[int, ...], entry: dict[str, Any], is_transposed: bool
) -> tuple[Leaf, dict[str, np.ndarray], int]:
    """A leaf, its arrays, and the steps that it has seen."""
    theirs = shape[::-1] if is_transposed else shape
    names = ["mu", "nu"][: 2 if "state2" in entry else 1]
    arrays: dict[str, np.ndarray] = {}
    formats = set()
    for number, (name, signed) in enumerate(zip(names, SIGNED, strict=False), 1):
        codes = _array(path, entry, f"state{number}", (np.uint8, np.float32), theirs)
        formats.add("dynamic" if codes.dtype == np.uint8 else "float32")
        arrays[name] = codes
        if codes.dtype == np.uint8:
            arrays[f"{name}_scale"] = _scales(path, entry, number, signed, codes.size)
    if len(formats) > 1:
        raise ValueError(f"{path}: state1 and state2 have different dtypes")
    format = formats.pop()
    count = _steps(path, entry)
    start = (0,) * len(shape)
    if is_transposed:
        leaf = Leaf(path, theirs, format, theirs, (start,))
        contents = with_arrays(
            Contents("adam" if len(names) == 2 else "lion", False, 0, (leaf,), _none),
            {(0, 0, name): array for name, array in arrays.items()},
        )
        values = decode_leaf(contents, 0)
        format, arrays = "float32", {k: np.ascontiguousarray(v.T) for k, v in values.items()}
    return Leaf(path, shape, format, shape, (start,)), arrays, count


def _steps(path: str, entry: dict[str, Any]) -> int:
    """How many steps a parameter has seen."""
    if "step" not in entry:
        raise ValueError(f"{path}: there is no 'step' in its state")
    step = _numpy(entry["step"])
    if step.size != 1 or step.dtype.kind not in "iuf" or not 0 <= step.item() < 2**31 - 1:
        raise ValueError(f"{path}: its step is {entry['step']!r}; it counts the updates so far")
    if step.item() != int(step.item()):
        raise ValueError(f"{path}: its step is {step.item()}, and no whole number")
    return int(step.item())


def _scales(path: str, entry: dict[str, Any], number: int, signed: bool, size: int) -> np.ndarray:
    """The scales of one state, if its codes are those of `dynamic`."""
    if not np.array_equal(
        _array(path, entry, f"qmap{number}", (np.float32,), (256,)), reference.dynamic_map(signed)
    ):
        raise ValueError(
            f"{path}: qmap{number} is not the dynamic map of bitsandbytes 0.44 and newer, so its"
            " codes mean other numbers"
        )
    name, blocks = f"absmax{number}", (-(-size // BLOCK),)
    if name in entry and np.shape(entry[name]) != blocks:
        raise ValueError(
            f"{path}: {name} has the shape {tuple(np.shape(entry[name]))}, and must have {blocks}:"
            f" a scale for each {BLOCK} of {size} elements. Before 0.44 bitsandbytes had blocks of"
            " 2,048; step once with a newer one and save again."
        )
    return _array(path, entry, name, (np.float32,), blocks)


def _array(
    path: str, entry: dict[str, Any], name: str, dtypes: Sequence[Any], shape: tuple[int, ...]
) -> np.ndarray:
    """An array of an entry, in native byte order and C order."""
    if name not in entry:
        raise ValueError(
            f"{path}: there is no {name!r} in its state, only {_list(map(repr, entry))}"
        )
    array = _numpy(entry[name])
    native = array.dtype.newbyteorder("=")
    if native not in [np.dtype(dtype) for dtype in dtypes]:
        known = " or ".join(np.dtype(dtype).name for dtype in dtypes)
        raise TypeError(f"{path}: {name} is {array.dtype}, and must be {known}")
    if array.shape != shape:
        raise ValueError(
            f"{path}: {name} has the shape {array.shape}, and must have {shape}. Does names match"
            " the order of the optimizer, and is the leaf one of `transposed`?"
        )
    return np.ascontiguousarray(array, native).reshape(shape)  # a scalar stays one


def _numpy(value: Any) -> np.ndarray:
    """An array of a NumPy array, a number or a tensor of torch."""
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    return np.asarray(value)
