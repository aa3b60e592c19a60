"""Arrays that XLA steps: how the rule ``array`` stores them."""

import numpy as np

from .formats import (
    RATIO_BITS,
    Halves,
    Quantized,
    Squares,
    quantize,
    quantize_array,
    quantize_halves,
    ratio_random,
)

_LARGEST = np.float32(2.0**100)


def storable(values: np.ndarray) -> np.ndarray:
    """What the formats but ``float32`` can store: 0 in place of NaN, and nothing above 2^100."""
    return np.clip(np.where(np.isnan(values), np.float32(0), values), -_LARGEST, _LARGEST)


def store_array(values: np.ndarray, format: str, leaf_key: int, count: int) -> tuple:
    """What is stored of an array, as `from_arrays` returns it.

    Args:
      values: of any shape; float32, bfloat16 or float16.
      format: a name in `_tables.FORMATS`.
      leaf_key: names the leaf, for the random bits.
      count: number of steps already taken.
    """
    flat = np.asarray(values).astype(np.float32).ravel()
    if format == "float32":
        return (flat,)
    flat = storable(flat)
    random = ratio_random(leaf_key, count, flat.size)
    stored: Squares | Halves | Quantized
    if format in RATIO_BITS:
        stored = quantize_array(flat, random, RATIO_BITS[format])
    elif format == "bfloat16":
        stored = quantize_halves(flat, random)
    else:
        stored = quantize(flat, signed=True)
    return (stored,)
