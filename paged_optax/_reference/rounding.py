"""Random bits, and how parameters of 16 bits are rounded with them."""

from typing import NamedTuple

import numpy as np


def random_bits(leaf_key: int, count: int, start: int, size: int) -> np.ndarray:
    """Random bits for the elements [start, start + size) of a leaf, a word each.

    Args:
      leaf_key: 64 bits, signed or not, that name the leaf.
      count: number of steps already taken.
      start: index of the first element in its leaf.
      size: number of elements.

    Returns:
      uint32 array of shape (size,).
    """
    before = mix(np.array([count], np.uint32), 0x9E3779B9, 0x7F4A7C15)
    between = mix(np.array([count], np.uint32), 0xBF58476D, 0x94D049BB)
    return random_bits_from((before, between), leaf_key, start, size)


def random_bits_from(keys, leaf_key: int, start: int, size: int) -> np.ndarray:
    """As `random_bits`, with two given words instead of those that follow from a step."""
    before, between = (np.asarray(key, np.uint32) for key in keys)
    leaf_key %= 2**64
    index = np.uint64(start) + np.arange(size, dtype=np.uint64)
    place = (index >> np.uint64(32)).astype(np.uint32) * np.uint32(0x9E3779B1)
    place ^= np.uint32(leaf_key // 2**32)
    before = before ^ np.uint32(leaf_key % 2**32) ^ place * np.uint32(0xC2B2AE3D)
    between = between ^ place
    return mix(index.astype(np.uint32), before, between)


def mix(x: np.ndarray, before, between) -> np.ndarray:
    x = x ^ np.asarray(before, np.uint32)
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15)) ^ np.asarray(between, np.uint32)) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


class ParamHyperparams(NamedTuple):
    learning_rate: float
    weight_decay: float = 0.0


ZERO_RESIDUAL = 128
_POWER = np.float32(2.0**112)  # dividing by this gives a float32 the exponent bits of a float16


def dropped_bits(dtype) -> int:
    """How many more mantissa bits a float32 has than a 16-bit type."""
    return 13 if dtype == np.float16 else 16


def aligned_bits(x: np.ndarray, dtype) -> np.ndarray:
    """float32 as uint32 bits in which numbers of the 16-bit type `dtype` end in zeros."""
    with np.errstate(all="ignore"):
        return (x / _POWER if dtype == np.float16 else x).astype(np.float32).view(np.uint32)


def from_aligned_bits(bits: np.ndarray, dtype) -> np.ndarray:
    """The float32 of such bits."""
    x = np.asarray(bits, np.uint32).view(np.float32)
    with np.errstate(all="ignore"):
        return x * _POWER if dtype == np.float16 else x


def round_stochastically(x: np.ndarray, random: np.ndarray, dtype) -> np.ndarray:
    """float32 to `dtype`, up or down with a mean of x.

    Args:
      x: float32 array.
      random: uint32 array; its leading bits are used.
      dtype: bfloat16 or float16.
    """
    dropped = np.uint32(dropped_bits(dtype))
    bits = aligned_bits(x, dtype) + (random >> (np.uint32(32) - dropped))
    with np.errstate(over="ignore"):
        rounded = from_aligned_bits(bits >> dropped << dropped, dtype).astype(dtype)
    return np.where(np.isnan(x), np.asarray(np.nan, dtype), rounded)


def split_master(master: np.ndarray, random: np.ndarray, dtype) -> tuple[np.ndarray, np.ndarray]:
    """Parameters of type `dtype`, and residuals (uint8), that together stand for `master`.

    `master` is first rounded stochastically to 8 bits more than `dtype` has.
    """
    dropped = np.uint32(dropped_bits(dtype))
    unit = dropped - np.uint32(8)
    bits = aligned_bits(master, dtype) + (random >> (np.uint32(32) - unit)) >> unit
    up = bits + np.uint32(128)
    with np.errstate(over="ignore"):
        params = from_aligned_bits(up >> np.uint32(8) << dropped, dtype).astype(dtype)
    residuals = (up & np.uint32(255)).astype(np.uint8)
    return np.where(np.isnan(master), np.asarray(np.nan, dtype), params), residuals


def join_master(params: np.ndarray, residuals: np.ndarray) -> np.ndarray:
    """The float32 master weights of parameters (bfloat16 or float16) and residuals."""
    dtype, param = params.dtype, params.astype(np.float32)
    unit = np.uint32(dropped_bits(dtype) - 8)
    bits = aligned_bits(param, dtype) + (residuals.astype(np.uint32) - np.uint32(128) << unit)
    return np.where(param == 0, param, from_aligned_bits(bits, dtype))


def change(direction, params, hyperparams: ParamHyperparams, decays: bool = True) -> np.ndarray:
    """What float32 parameters change by, before any rounding to another type."""
    lr, decay = (np.float32(x) for x in hyperparams)
    with np.errstate(all="ignore"):
        return -lr * (direction + (decay if decays else np.float32(0)) * params)


def step_params(
    direction: np.ndarray,
    params: np.ndarray,
    residuals: np.ndarray,
    random: np.ndarray,
    hyperparams: ParamHyperparams,
    rounding: str,
    decays: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """A step in place of one leaf's parameters, all arrays flat.

    Args:
      direction: what the rule returned, float32.
      params: float32, bfloat16 or float16.
      residuals: uint8, those of the parameters; used for ``"compensated"`` and 16 bits.
      random: uint32, for 16-bit parameters.
      hyperparams: learning rate and weight decay.
      rounding: ``"nearest"``, ``"stochastic"`` or ``"compensated"``.
      decays: whether weight decay applies.

    Returns:
      ``(params, residuals)`` after the step.
    """
    dtype, master = params.dtype, params.astype(np.float32)
    if rounding == "compensated" and dtype != np.float32:
        master = join_master(params, residuals)
    with np.errstate(all="ignore"):
        exact = master + change(direction, master, hyperparams, decays)
        if dtype == np.float32 or rounding == "nearest":
            return exact.astype(dtype), residuals
    if rounding == "compensated":
        return split_master(exact, random, dtype)
    return round_stochastically(exact, random, dtype), residuals


def update_params(
    direction: np.ndarray,
    params: np.ndarray,
    residuals: np.ndarray,
    random: np.ndarray,
    hyperparams: ParamHyperparams,
    dtype,
    rounding: str,
    decays: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """Updates of one leaf's parameters, of type `dtype`; other arguments as of `step_params`.

    `rounding` is ``"stochastic"`` or ``"compensated"``.

    Returns:
      ``(update, residuals)``; the new parameters are ``params + update`` in their own type.
    """
    with np.errstate(all="ignore"):
        if params.dtype == np.float32:
            return change(direction, params, hyperparams, decays).astype(dtype), residuals
        rounded, residuals = step_params(
            direction, params, residuals, random, hyperparams, rounding, decays
        )
        param = params.astype(np.float32)
        update = (rounded.astype(np.float32) - param).astype(dtype)
        landed = (param + update.astype(np.float32)).astype(params.dtype)
    if rounding != "compensated":
        return update, residuals
    return update, np.where(landed == rounded, residuals, np.uint8(ZERO_RESIDUAL))
