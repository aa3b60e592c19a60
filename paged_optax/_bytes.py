"""Numbers of bytes: checked, and printed for people."""

import operator
from typing import Any


def check_bytes(name: str, value: Any) -> int:
    """The number of bytes as an int; refuses what a machine cannot have. NumPy's ints will do."""
    # A truth value is an int for Python, and a mistake here.
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} is {value!r}; it must be an int, a number of bytes")
    try:
        value = operator.index(value)
    except TypeError:  # an array of several, or of floats
        raise TypeError(f"{name} is {value!r}; it must be an int, a number of bytes") from None
    if value < 0:
        raise ValueError(f"{name} is {value}; it counts bytes and cannot be negative")
    return value


def format_bytes(nbytes: int) -> str:
    """Bytes for people: ``2.03 MiB``."""
    value, units = float(nbytes), ["B", "KiB", "MiB", "GiB", "TiB", "PiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{nbytes} B" if units[0] == "B" else f"{value:.2f} {units[0]}"
