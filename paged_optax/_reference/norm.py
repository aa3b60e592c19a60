"""The global norm, in the order in which it is defined to be added, and the scale of a clipping."""

from collections.abc import Sequence

import numpy as np

from .formats import BLOCK_SIZE

PIECE_SIZE = 64 * BLOCK_SIZE  # elements that are added together before others come
LANES = 32
ADDERS = 256


def global_norm(leaves: Sequence[np.ndarray]) -> np.float32:
    """The root of the sum of squares of all elements of float32, bfloat16 or float16 arrays."""
    pieces = []
    for leaf in leaves:
        flat = np.asarray(leaf).ravel().astype(np.float32)
        for start in range(0, flat.size, PIECE_SIZE):
            pieces.append(_add_piece(flat[start : start + PIECE_SIZE]))
    adders = np.zeros(ADDERS, np.float64)
    with np.errstate(all="ignore"):
        for i, piece in enumerate(pieces):
            adders[i % ADDERS] += piece
        return np.float32(np.sqrt(_fold(adders, 1)[0]))


def clip_scale(norm: np.float32, max_norm: float) -> np.float32:
    """By what gradients of this norm are multiplied."""
    with np.errstate(all="ignore"):
        limit = np.float32(max_norm)
        return np.float32(1) if norm < limit else limit / norm


def _add_piece(flat: np.ndarray) -> np.float64:
    blocks = np.zeros((-(-flat.size // BLOCK_SIZE), BLOCK_SIZE), np.float32)
    blocks.ravel()[: flat.size] = flat
    lanes = np.zeros(LANES, np.float64)
    with np.errstate(all="ignore"):
        for squares in blocks * blocks:
            lanes += _fold(squares, LANES)
        return _fold(lanes, 1)[0]


def _fold(numbers: np.ndarray, size: int) -> np.ndarray:
    """Adds the upper half onto the lower one, until so many numbers are left."""
    while numbers.size > size:
        low, high = np.split(numbers, 2)
        numbers = low + high
    return numbers
