"""Contents of states as a flat dict of NumPy arrays, for formats that other programs write."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from . import _metadata
from ._contents import Contents, Damaged

ABOUT = "paged_optax"  # the key of the metadata: their text in UTF-8, as uint8


def to_arrays(states: Sequence[Contents | None], **extra: Any) -> dict[str, np.ndarray]:
    """The arrays of states, in host memory, by the names that a file gives them.

    Args:
      states: None for a state that was never updated.
      **extra: what else the metadata say, for `from_arrays` to return.
    """
    text = _metadata.encode(states, **extra).encode()
    arrays = {ABOUT: np.frombuffer(text, np.uint8)}
    arrays.update((entry.key, entry.read()) for entry in _metadata.entries_of(states))
    return arrays


def from_arrays(arrays: Mapping[str, Any]) -> tuple[list[Contents | None], dict[str, Any]]:
    """The states in what `to_arrays` returned, and what else the metadata say.

    The contents refer to these arrays, and copy nothing.

    Raises:
      ValueError: if arrays are missing or of another dtype or shape; if a newer version of the
        library wrote them.
    """
    if ABOUT not in arrays:
        raise Damaged(f"there is no array {ABOUT!r}: these are not moments from export_moments")
    states, about = _metadata.decode(np.asarray(arrays[ABOUT], np.uint8).tobytes())
    found = {entry.key: _check(entry, arrays) for entry in _metadata.entries_of(states)}
    return _metadata.with_data(states, found), about


def _check(entry: _metadata.Entry, arrays: Mapping[str, Any]) -> np.ndarray:
    """The array of an entry, if it is as it should be."""
    if entry.key not in arrays:
        raise Damaged(f"array {entry.key} is missing")
    array = np.asarray(arrays[entry.key])
    if array.dtype != entry.field.dtype or array.shape != entry.shape:
        raise Damaged(
            f"array {entry.key} is {array.dtype}{list(array.shape)}, and must be"
            f" {entry.field.dtype}{list(entry.shape)}"
        )
    return np.ascontiguousarray(array).reshape(entry.shape)  # a scalar stays one
