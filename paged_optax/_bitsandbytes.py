"""Moments of bitsandbytes' 8-bit optimizers into paged states.

A state dict of bitsandbytes has, by the place of a parameter in the optimizer, its step and the
tensors of each moment: ``state1`` and ``state2`` in the parameter's shape, uint8 with ``qmap1``
(the map of the codes) and ``absmax1`` (a scale for 256 elements), or float32 for small parameters.
``state1`` of AdEMAMix has both of its means, stacked. From 0.49.2 on these tensors are nested once
more, in ``__bnb_optimizer_quant_state__``. Nothing says which optimizer a state dict is of.

Everything here works on NumPy arrays. Tensors of torch are asked to become such, so that torch is
needed only by those who have it.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ._adam import ScaleByPagedAdam8bitState
from ._ademamix import ScaleByPagedAdemamix8bitState
from ._bitsandbytes_entry import OPTIMIZERS, no_data, read_entry, some_of
from ._contents import Contents, with_arrays
from ._lion import ScaleByPagedLion8bitState
from ._log import warn
from ._names import names_of, number_tree
from ._replace import replace_moments
from ._rmsprop import ScaleByPagedRms8bitState, ScaleByPagedRss8bitState
from ._sgd import ScaleByPagedTrace8bitState
from ._state import is_state

NESTED = "__bnb_optimizer_quant_state__"
_RULES: dict[type, str] = {
    ScaleByPagedAdam8bitState: "adam",
    ScaleByPagedAdemamix8bitState: "ademamix",
    ScaleByPagedLion8bitState: "lion",
    ScaleByPagedRms8bitState: "rms",
    ScaleByPagedRss8bitState: "rss",
    ScaleByPagedTrace8bitState: "trace",
}


def from_bitsandbytes(
    opt_state: Any,
    state_dict: Mapping[Any, Any],
    params: Any,
    names: Sequence[str] | Mapping[Any, str],
    *,
    transposed: Collection[str] = (),
) -> Any:
    """An optimizer state with the moments, and the count, of an optimizer of bitsandbytes.

    For Adam, AdamW, LAMB, Lion, AdEMAMix, SGD, RMSprop and Adagrad in 8 and 32 bits, paged or not.
    An optimizer with ``Quantization("dynamic")`` goes on with the same bits. Other formats, and
    transposed leaves, are rounded once, to nearest, by the first update that takes the state.

    A state dict does not say which optimizer it is of, so `opt_state` does: `paged_sgd8bit` takes
    it for SGD's. What contradicts that is refused, but the momentum of SGD looks like Lion's.
    LARS is refused, since optax's has another momentum.

    AdEMAMix of bitsandbytes loses two scales of a parameter whose size is no multiple of 256. Up to
    256 values of each mean begin at 0 then, with a warning that names the parameter.

    Args:
      opt_state: what `init` of the same optimizer returned, with one paged state in it. Only its
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
      ValueError: if a parameter is missing, or there twice, or of another shape; if it has the
        state of another optimizer than `opt_state`; if it was not quantized in blocks of 256 with
        the map that `Quantization("dynamic")` has; if parameters have seen different numbers of
        steps; if there is another number of paged states. From the first update (there also
        JaxRuntimeError): if scales or moments are not finite.
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
    paths = names_of([path for path, _ in pairs])
    keys = find_keys(names, paths, entries)
    check_known("transposed", transposed, paths)
    if not paths:
        raise ValueError("params has no leaves; pass the parameters of the optimizer")
    rule = _rule_of(opt_state, [entries[keys[path]] for path in paths])
    found = [
        read_entry(path, np.shape(leaf), entries[keys[path]], rule, path in transposed)
        for path, (_, leaf) in zip(paths, pairs, strict=True)
    ]
    steps = {path: entry.num_steps for path, entry in zip(paths, found, strict=True)}
    if len(set(steps.values())) > 1:
        low, high = min(steps, key=steps.__getitem__), max(steps, key=steps.__getitem__)
        raise ValueError(
            f"parameters have seen different numbers of steps: {low} {steps[low]} and {high}"
            f" {steps[high]}; one state has one count. Keep them in states of their own"
            " (optax.partition)."
        )
    for entry in found:
        if entry.note:
            warn(f"paged_optax: {entry.note}", stacklevel=2)
    leaves = tuple(entry.leaf for entry in found)
    contents = Contents(
        rule, False, number_tree(paths, treedef), leaves, no_data, found[0].num_steps
    )
    arrays = {(i, 0, k): a for i, entry in enumerate(found) for k, a in entry.arrays.items()}
    return replace_moments(opt_state, [with_arrays(contents, arrays)], convert=True)


def _rule_of(opt_state: Any, entries: Sequence[Mapping[str, Any]]) -> str:
    """The rule of the paged state; of mappings, which do not tell, Lion's or Adam's."""
    states = [node for node in jax.tree.leaves(opt_state, is_leaf=is_state) if is_state(node)]
    kinds = [type(state) for state in states if not isinstance(state, Mapping)]
    for kind in kinds:
        if kind not in _RULES:
            raise ValueError(
                f"opt_state has a {kind.__name__}, and bitsandbytes has no optimizer with such a"
                f" state; it has {', '.join(OPTIMIZERS.values())}. Begin with fresh moments."
            )
    if len(kinds) == 1:
        return _RULES[kinds[0]]
    return "adam" if any("state2" in entry for entry in entries) else "lion"


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
                f" {some_of(map(repr, entries))}"
            )
    return keys


def check_known(what: str, names: Collection[str], paths: Sequence[str]) -> None:
    if isinstance(names, str):
        raise TypeError(f"{what} is {names!r}; it must be a collection of names")
    for name in names:
        if name not in paths:
            raise ValueError(f"{what} has {name!r}, which is no leaf; there are {some_of(paths)}")
