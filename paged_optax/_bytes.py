"""Numbers of bytes: checked, and read and printed for people."""

import operator
import re
from typing import Any

_UNITS = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"]
_DECIMAL_UNITS = ["B", "kB", "MB", "GB", "TB", "PB"]


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
    value, units = float(nbytes), list(_UNITS)
    while value >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{nbytes} B" if units[0] == "B" else f"{value:.2f} {units[0]}"


def parse_bytes(name: str, value: Any) -> int:
    """The number of bytes that a person or a program gave: ``"48GiB"``, ``"80 GB"`` or an int.

    Units with an i are powers of 1,024, those without are powers of 1,000. Case does not matter.
    """
    if not isinstance(value, str):
        return check_bytes(name, value)
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-zA-Z]*)\s*", value)
    unit = match[2].lower() if match else ""
    for base, units in ((1024, _UNITS), (1000, _DECIMAL_UNITS)):
        known = [known.lower() for known in units]
        if match and unit in ("", *known):
            return round(float(match[1]) * base ** (known.index(unit) if unit else 0))
    raise ValueError(
        f"{name} is {value!r}, which is not a size; write a number of bytes, or a number and a unit"
        f" ({', '.join(_UNITS[1:])} of 1,024, {', '.join(_DECIMAL_UNITS[1:])} of 1,000), as in"
        " '48GiB'"
    )
