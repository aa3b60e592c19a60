"""One step of one leaf: decode its states, apply the rule, encode them again."""

from typing import Any

import numpy as np

from .formats import (
    BLOCK_SIZE,
    RatioState,
    check_ratio,
    decode,
    encode,
    quantize,
    quantize_ratio,
    quantize_squares,
    ratio_random,
)
from .rules import RULES, Hyperparams, bound_ratios


def init_leaf(size: int, quantized: bool, codec: str = "dynamic", rule: str = "adam") -> Any:
    """States of zero: a `LeafState`, a `RatioState`, or that of another rule."""
    zeros = np.zeros(size, np.float32)
    _, state, signed = RULES[rule]
    if not quantized:
        return state(*[zeros] * len(signed))
    if codec == "ratio" and all(signed):
        return state(*[quantize_squares(zeros, np.zeros(size, np.uint32))] * len(signed))
    if codec == "ratio":
        check_ratio(signed)
        return quantize_ratio(zeros, zeros, np.zeros(size, np.uint32))._replace(
            nu_words=np.zeros(-(-size // BLOCK_SIZE), np.float32)
        )
    return state(*(quantize(zeros, signed=sign) for sign in signed))


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
) -> tuple[np.ndarray, Any]:
    """As `step_leaf`, but the update is flat and float32."""
    flat = np.asarray(grad).ravel().astype(np.float32)
    step, _, signed = RULES[rule]
    flags = {"nesterov": True} if nesterov else {}
    direction, *states = step(
        flat,
        *decode(state, signed, flat.size),
        count=count,
        hyperparams=hyperparams,
        skip_elements=skip_elements,
        **flags,
    )
    if isinstance(state, RatioState):
        mu, nu = states
        states = [bound_ratios(mu, nu, hyperparams), nu]
    state = encode(states, state, signed, lambda: ratio_random(leaf_key, count, flat.size))
    return direction, state
