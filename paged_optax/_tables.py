"""The rules and formats that the extension has, in the order of their numbers."""

from typing import Any

RULES: list[dict[str, Any]] = [
    {
        "name": "adam",
        "states": [("mu", "signed"), ("nu", "nonnegative")],
        "hyperparams": [
            ("b1", "decay"),
            ("b2", "decay"),
            ("eps", "nonnegative"),
            ("eps_root", "nonnegative"),
        ],
        "flags": ["nesterov"],
    },
]
FORMATS: list[str] = ["float32", "dynamic", "ratio"]
# Enum ParamRounding in xla_ffi/step/params.h.
PARAM_ROUNDINGS = ("nearest", "stochastic", "compensated")

FLOAT32 = FORMATS.index("float32")
DYNAMIC = FORMATS.index("dynamic")
RATIO = FORMATS.index("ratio")
CODECS = {"dynamic": DYNAMIC, "ratio": RATIO}  # the formats of 8 bits


def rule_number(name: str) -> int:
    """The number of the rule in `RULES`."""
    return next(number for number, rule in enumerate(RULES) if rule["name"] == name)
