"""Numbers of bytes: checked, and printed for people."""

from typing import Any


def check_bytes(name: str, value: Any) -> None:
    """Refuses what is not a number of bytes that a machine can have."""
    if not isinstance(value, int):
        raise TypeError(f"{name} is {value!r}; it must be an int, a number of bytes")
    if value < 0:
        raise ValueError(f"{name} is {value}; it counts bytes and cannot be negative")


def format_bytes(nbytes: int) -> str:
    """Bytes for people: ``2.03 MiB``."""
    value, units = float(nbytes), ["B", "KiB", "MiB", "GiB", "TiB", "PiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{nbytes} B" if units[0] == "B" else f"{value:.2f} {units[0]}"
