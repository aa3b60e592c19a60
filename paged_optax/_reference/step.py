"""One step of one leaf: decode its states, apply the rule, encode them again."""

import functools
from typing import Any

import numpy as np

from .formats import (
    BLOCK_SIZE,
    RATIO_BITS,
    Halves,
    RatioState,
    Squares,
    TwoRatios,
    Window,
    decode,
    encode,
    quantize,
    ratio_kind,
    ratio_random,
    takes_signed_map,
)
from .rules import RULES, Hyperparams


def init_leaf(size: int, quantized: bool, codec: str = "dynamic", rule: str = "adam") -> Any:
    """States of zero: a `LeafState`, a `RatioState`, or that of another rule."""
    zeros = np.zeros(size, np.float32)
    row = RULES[rule]
    if not quantized or codec == "float32":
        return row.state(*[zeros] * len(row.signed))
    if codec in RATIO_BITS:
        return _init_ratio(size, row, RATIO_BITS[codec])
    if codec == "bfloat16":
        codes = np.zeros(-(-size // BLOCK_SIZE) * BLOCK_SIZE, np.uint16)
        return row.state(*[Halves(codes)] * len(row.signed))
    return row.state(*(quantize(zeros, takes_signed_map(sign, row.signed)) for sign in row.signed))


def _init_ratio(size: int, row: Any, bits: int) -> Any:
    words = np.zeros(-(-size // BLOCK_SIZE), np.float32)
    codes = np.zeros(words.size * BLOCK_SIZE, np.uint8)
    kind = ratio_kind(row.signed, bits)
    if issubclass(kind, Squares | Window):
        return row.state(kind(codes, words))
    return kind(*[codes] * len(row.signed), *[words] * len(row.signed))


def step_leaf(
    grad: np.ndarray,
    state: Any,
    count: int,
    hyperparams: Hyperparams | Any,
    nesterov: bool = False,
    *,
    rule: str = "adam",
    skip_elements: bool = False,
    leaf_key: int = 0,
) -> tuple[np.ndarray, Any]:
    """One step for one leaf.

    Args:
      grad: gradient of any shape; float32, bfloat16 or float16.
      state: what `init_leaf` or the last step returned.
      count: number of steps already taken.
      hyperparams: those of the rule.
      nesterov: whether to use Nesterov momentum, for rules that have it.
      rule: a name in `RULES`.
      skip_elements: whether elements whose gradient is not finite are skipped.
      leaf_key: names the leaf, for the random bits of the ``ratio`` code.

    Returns:
      ``(update, state)``; the update has the gradient's shape and dtype.
    """
    direction, state = directions(
        grad,
        state,
        count,
        hyperparams,
        nesterov,
        rule=rule,
        skip_elements=skip_elements,
        leaf_key=leaf_key,
    )
    with np.errstate(over="ignore"):
        return direction.astype(grad.dtype).reshape(grad.shape), state


def directions(
    grad: np.ndarray,
    state: Any,
    count: int,
    hyperparams: Hyperparams | Any,
    nesterov: bool = False,
    *,
    rule: str = "adam",
    skip_elements: bool = False,
    leaf_key: int = 0,
    **flags: bool,
) -> tuple[np.ndarray, Any]:
    """As `step_leaf`, but the update is flat and float32; `flags` are other flags of the rule."""
    flat = np.asarray(grad).ravel().astype(np.float32)
    row = RULES[rule]
    if nesterov:
        flags["nesterov"] = True
    states = decode(state, row.signed, flat.size)
    if count == 0 and not all(row.signed):
        place = row.signed.index(False)
        states[place] = states[place] + np.float32(row.initial(hyperparams))
    direction, *states = row.step(
        flat,
        *states,
        count=count,
        hyperparams=hyperparams,
        skip_elements=skip_elements,
        **flags,
    )
    if isinstance(state, RatioState | TwoRatios):
        states = row.bound(states, hyperparams)
    random = functools.partial(ratio_random, leaf_key, count, flat.size)
    return direction, encode(states, state, row.signed, random, direction)
