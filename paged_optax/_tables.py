"""What the extension knows how to do, in the order of its numbers."""

from typing import Any

from . import _ext

RULES: list[dict[str, Any]] = _ext.rules()
FORMATS: list[dict[str, Any]] = _ext.formats()
FORMAT_NAMES = [row["name"] for row in FORMATS]
PARAM_ROUNDINGS = tuple(_ext.param_roundings())
OUTPUTS = _ext.outputs()


def rule_number(name: str) -> int:
    """The number of the rule in `RULES`."""
    return next(number for number, rule in enumerate(RULES) if rule["name"] == name)
