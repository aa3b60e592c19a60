"""What bitsandbytes keeps of one parameter, and the leaf that it becomes."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from . import _reference as reference
from ._contents import BLOCK, Contents, Leaf, Shape, with_arrays
from ._moments import decode_leaf
from ._tables import RULES, rule_number

SIGNED = (True, False)  # the maps of state1 and state2
OPTIMIZERS = {  # theirs, by the rules that have the same states
    "adam": "Adam, AdamW or LAMB",
    "ademamix": "AdEMAMix",
    "lion": "Lion",
    "trace": "SGD",
    "rms": "RMSprop",
    "rss": "Adagrad",
}
_ZERO = 127  # the code of 0 in the signed map; what is below it is negative


class Entry(NamedTuple):
    """A parameter of theirs, as ours."""

    leaf: Leaf
    arrays: dict[str, np.ndarray]  # by the names of fields
    num_steps: int  # that it has seen
    note: str  # what the user should know; may be empty


def tensors_of(rule: str) -> list[list[str]]:
    """The names of the states in ``state1`` and, if there is one, in ``state2``."""
    names = [name for name, _ in RULES[rule_number(rule)]["states"]]
    return [names[:2], names[2:]] if rule == "ademamix" else [[name] for name in names]


def read_entry(
    path: str, shape: Shape, entry: dict[str, Any], rule: str, is_transposed: bool
) -> Entry:
    """A parameter of theirs as a leaf of an optimizer with that rule."""
    _check_optimizer(path, entry, rule)
    theirs = shape[::-1] if is_transposed else shape
    arrays: dict[str, np.ndarray] = {}
    formats, notes = set(), []
    for number, names in enumerate(tensors_of(rule), 1):
        found, note = _read_tensor(path, entry, number, names, theirs)
        notes.append(note)
        formats.add("float32" if found.keys() == set(names) else "dynamic")
        arrays |= found
    if len(formats) > 1:
        raise ValueError(f"{path}: state1 and state2 have different dtypes")
    format = formats.pop()
    if rule in ("rms", "rss"):
        _check_not_negative(path, *arrays.values(), rule=rule)
    start = (0,) * len(shape)
    if is_transposed:
        leaf = Leaf(path, theirs, format, theirs, (start,))
        contents = with_arrays(
            Contents(rule, False, 0, (leaf,), no_data),
            {(0, 0, name): array for name, array in arrays.items()},
        )
        values = decode_leaf(contents, 0)
        format, arrays = "float32", {k: np.ascontiguousarray(v.T) for k, v in values.items()}
    leaf = Leaf(path, shape, format, shape, (start,))
    return Entry(leaf, arrays, _steps(path, entry), "".join(notes))


def no_data(*key: Any) -> np.ndarray:
    """Of contents whose arrays come later."""
    raise AssertionError(key)


def _check_optimizer(path: str, entry: dict[str, Any], rule: str) -> None:
    """Refuses the state of another optimizer, as far as it tells."""
    has_two = len(tensors_of(rule)) == 2
    if "state1" in entry and "state2" in entry and not has_two:
        found = "a state2, as of Adam, AdamW, LAMB or AdEMAMix"
    elif "state1" in entry and "state2" not in entry and has_two:
        found = "no state2, as of Lion, SGD, RMSprop or Adagrad"
    elif "unorm_vec" in entry and not has_two:
        found = "a unorm_vec, as of LARS, whose momentum is not that of optax.lars"
    else:
        return
    raise ValueError(
        f"{path}: its state has {found}, and opt_state takes that of {OPTIMIZERS[rule]}. Make"
        " opt_state with init(params) of the same optimizer; if there is none here, begin with"
        " fresh moments."
    )


def _read_tensor(
    path: str, entry: dict[str, Any], number: int, names: Sequence[str], shape: Shape
) -> tuple[dict[str, np.ndarray], str]:
    """The arrays of the states that share one tensor, by the names of fields, and a note."""
    stacked = (len(names), *shape) if len(names) > 1 else shape
    tensor = _array(path, entry, f"state{number}", (np.uint8, np.float32), stacked)
    split = np.split(tensor, len(names)) if len(names) > 1 else [tensor]
    parts = {name: part.reshape(shape) for name, part in zip(names, split, strict=True)}
    if tensor.dtype == np.float32:
        return parts, ""
    _check_map(path, entry, number)
    size = tensor.size // len(names)
    blocks = -(-size // BLOCK)
    scales = _scales(path, entry, number, (len(names), blocks) if len(names) > 1 else (blocks,))
    if len(names) == 1:
        return parts | {f"{names[0]}_scale": scales}, ""
    (fast, slow), note = names, ""
    if size % BLOCK and _is_overlapping(scales):
        parts[fast], parts[slow], scales = _without_lost(parts[fast], parts[slow], scales)
        note = (
            f"{path}: it has {size} elements, no multiple of {BLOCK}. For such parameters AdEMAMix"
            " of bitsandbytes keeps a scale of the slow mean where one of the fast mean is, so both"
            f" are lost: the last {size % BLOCK} values of m1 and the first {min(size, BLOCK)} of"
            " m2 begin at 0"
        )
    return parts | {f"{fast}_scale": scales[0], f"{slow}_scale": scales[1]}, note


def _is_overlapping(scales: np.ndarray) -> bool:
    """Whether the scales of AdEMAMix's slow mean begin a place too early.

    Their kernels for GPUs count whole blocks only where the slow mean begins. So the last scale of
    the fast mean and the first of the slow one have one place, and the last place stays 0. On a CPU
    it is 0 only if that block never had a gradient, and then the last of the fast mean is 0 too.
    Of the last blocks the same ones are idle in both means.
    """
    if scales[1, -1] != 0:
        return False
    return bool(scales[0, -1] != 0 or _num_last_zeros(scales[1]) > _num_last_zeros(scales[0]))


def _num_last_zeros(scales: np.ndarray) -> int:
    used = np.flatnonzero(scales)
    return scales.size - 1 - (used[-1] if used.size else -1)


def _without_lost(
    fast: np.ndarray, slow: np.ndarray, scales: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes and scales of overlapping means, with zeros where the scale is lost.

    Either mean may have written the place that they share, so both have been read with the other's
    scale since.
    """
    blocks = scales.shape[1]
    flat, tail = scales.ravel(), (blocks - 1) * BLOCK
    scales = np.stack([flat[:blocks], flat[blocks - 1 : -1]])
    fast, slow = fast.copy(), slow.copy()
    scales[0, -1] = scales[1, 0] = 0
    fast.reshape(-1)[tail:] = slow.reshape(-1)[:BLOCK] = _ZERO
    return fast, slow, scales


def _check_not_negative(
    path: str, values: np.ndarray, scales: np.ndarray | None = None, *, rule: str
) -> None:
    """Refuses means and sums of squares that are below 0."""
    is_negative = values.ravel() < (0 if scales is None else _ZERO)
    if scales is not None:
        is_negative &= np.repeat(scales != 0, BLOCK)[: values.size]
    if num_negative := int(np.count_nonzero(is_negative)):
        raise ValueError(
            f"{path}: {num_negative} of {values.size} values of state1 are negative, which squares"
            f" are not, and opt_state takes the state of {OPTIMIZERS[rule]}. Is the state dict of"
            " Lion or SGD? Then make opt_state with init(params) of that optimizer."
        )


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


def _check_map(path: str, entry: dict[str, Any], number: int) -> None:
    """Refuses codes that are not those of `dynamic`."""
    found = _array(path, entry, f"qmap{number}", (np.float32,), (256,))
    if not np.array_equal(found, reference.dynamic_map(SIGNED[number - 1])):
        raise ValueError(
            f"{path}: qmap{number} is not the dynamic map of bitsandbytes 0.44 and newer, so its"
            " codes mean other numbers"
        )


def _scales(path: str, entry: dict[str, Any], number: int, shape: Shape) -> np.ndarray:
    name = f"absmax{number}"
    if name in entry and np.shape(entry[name]) != shape:
        raise ValueError(
            f"{path}: {name} has the shape {tuple(np.shape(entry[name]))}, and must have {shape}:"
            f" a scale for each {BLOCK} elements. Before 0.44 bitsandbytes had blocks of"
            " 2,048; step once with a newer one and save again."
        )
    return _array(path, entry, name, (np.float32,), shape)


def _array(
    path: str, entry: dict[str, Any], name: str, dtypes: Sequence[Any], shape: Shape
) -> np.ndarray:
    """An array of an entry, in native byte order and C order."""
    if name not in entry:
        raise ValueError(
            f"{path}: there is no {name!r} in its state, only {some_of(map(repr, entry))}"
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
            + _about_stacks(array.shape, shape)
        )
    return np.ascontiguousarray(array, native).reshape(shape)  # a scalar stays one


def _about_stacks(found: Shape, wanted: Shape) -> str:
    """What to add where one of two shapes is that of AdEMAMix's two means."""
    if found == (2, *wanted):
        return " Two means in one tensor are AdEMAMix's: make opt_state with paged_ademamix8bit."
    if wanted == (2, *found):
        return (
            " AdEMAMix has two means in it. AdEMAMix32bit and PagedAdEMAMix32bit of bitsandbytes"
            " have room for one only: begin with fresh moments."
        )
    return ""


def some_of(names: Iterable[str]) -> str:
    """The first few of them, as text."""
    names = list(names)
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _numpy(value: Any) -> np.ndarray:
    """An array of a NumPy array, a number or a tensor of torch."""
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    return np.asarray(value)
