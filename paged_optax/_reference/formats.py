"""The formats of moments: float32 values of a leaf to what is stored, and back.

``dynamic`` is the code of bitsandbytes; each state is stored alone. ``ratio`` stores first moments
as multiples of the square roots of their second moments, so it stores both together; where a rule
has but one kind of moment, it stores that alone. ``ratio6`` and ``ratio4`` do the same with
codes of 6 and of 4 bits.

References:
  Dettmers et al., `8-bit Optimizers via Block-wise Quantization
  <https://arxiv.org/abs/2110.02861>`_, 2022.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from .rounding import mix

BLOCK_SIZE = 256
_DECADES = 7
_SMALLEST_NORMAL = np.float32(2.0**-126)


@functools.cache
def dynamic_map(signed: bool) -> np.ndarray:
    """Values of the 256 codes of the ``dynamic`` map, ascending.

    Args:
      signed: True for first moments, False for second moments.

    Returns:
      Read-only float32 array of shape (256,), bit for bit that of bitsandbytes.
    """
    f32, f64 = np.float32, np.float64
    positive = []
    for decade in range(_DECADES):
        bins = 2**decade if signed else 2 ** (decade + 1)
        n = bins + 1
        step = f32((f32(1) - f32(0.1)) / f32(bins))
        # As torch.linspace rounds: the lower half counts up from 0.1, the upper half down from 1.
        edges = [
            f32(f64(f32(0.1)) + f64(step) * i) if i < n // 2 else f32(1.0 - f64(step) * (n - 1 - i))
            for i in range(n)
        ]
        power = f32(10.0 ** (decade - _DECADES + 1))
        positive += [
            f32(power * f32(f32(a + b) / f32(2))) for a, b in zip(edges, edges[1:], strict=False)
        ]
    negative = [-x for x in positive] if signed else []
    table = np.sort(np.array([*negative, 0.0, *positive, 1.0], np.float32))
    table.setflags(write=False)
    return table


class Quantized(NamedTuple):
    """Blocks of 256 codes with a scale each; the last block is padded with the code of zero."""

    codes: np.ndarray  # uint8 (num_blocks * 256,)
    scales: np.ndarray  # float32 (num_blocks,)


def quantize(values: np.ndarray, signed: bool) -> Quantized:
    """Quantizes a flat float32 array block by block: to the nearest value, ties to even codes.

    Negative first moments never take the code of zero. A block whose largest magnitude is subnormal
    becomes zero.
    """
    blocks = _to_blocks(values)
    scales = np.max(np.abs(blocks), axis=1, initial=np.float32(0))
    usable = scales >= _SMALLEST_NORMAL
    inverse = np.where(usable, np.float32(1) / np.where(usable, scales, 1), np.float32(0))
    x = blocks * inverse[:, None].astype(np.float32)
    table = dynamic_map(signed)
    middles = (table[:-1] + table[1:]) * np.float32(0.5)
    below = np.searchsorted(middles, x, side="left")  # puts a value on a middle below it
    above = np.searchsorted(middles, x, side="right")  # puts a value on a middle above it
    codes = np.where(below % 2 == 0, below, above)
    if signed:
        codes = np.where(np.signbit(x) & (codes == 127), 126, codes)
    return Quantized(codes.astype(np.uint8).ravel(), scales)


def dequantize(quantized: Quantized, signed: bool) -> np.ndarray:
    """The float32 values that codes and scales stand for, padding included."""
    blocks = dynamic_map(signed)[quantized.codes].reshape(-1, BLOCK_SIZE)
    return (blocks * quantized.scales[:, None]).ravel()


class RatioState(NamedTuple):
    """Moments of a leaf in the ``ratio`` code; blocks of 256 codes, two words a block.

    Code 0 is zero for both moments, so a fresh state is all zero bytes. In ``ratio6`` and
    ``ratio4`` a byte has a code of 6 or 4 bits.
    """

    bits = 8  # of a code
    mu_codes: np.ndarray  # uint8 (num_blocks * 256,), two's complement: -127 .. 127
    nu_codes: np.ndarray  # uint8 (num_blocks * 256,)
    mu_scales: np.ndarray  # float32 (num_blocks,)
    nu_words: np.ndarray  # float32 (num_blocks,); their bits are the words


class RatioState6(RatioState):
    """The same in the ``ratio6`` code."""

    bits = 6


class RatioState4(RatioState):
    """The same in the ``ratio4`` code."""

    bits = 4


class _Codes(NamedTuple):
    """What depends on the number of bits of a code."""

    number: int  # of codes
    top: int  # that of the largest second moment, before rounding
    ends: tuple[int, ...]  # so many parts of a block's range are left free at its ends
    coarsest: int  # step, in units of 2^14
    has_zeros: int  # bit of a word; the step takes the bits below
    largest: int  # second moment, as an exponent of 2; greater ones are stored as this one
    squares: np.float32  # that of the largest first moment, and a little less: no ratio reaches it


_CODES = {
    8: _Codes(256, 253, (64, 256), 1 << 7, 1 << 8, 127, np.float32(16128.99)),  # 127^2
    6: _Codes(64, 62, (16,), 1 << 9, 1 << 15, 127, np.float32(960.9994)),  # 31^2
    4: _Codes(16, 14, (4, 16), 1 << 11, 1 << 15, 124, np.float32(48.99997)),  # 7^2
}
_IDLE_RANGE = 15 << 23
_IS_WINDOW = 1 << 31  # in the word of a block of an array
_INFINITY = 0x7F800000


def quantize_ratio(mu: np.ndarray, nu: np.ndarray, random: np.ndarray, bits: int = 8) -> RatioState:
    """Quantizes flat float32 moments block by block, rounding at random without bias.

    Args:
      mu: first moments (size,).
      nu: second moments (size,), finite and not negative.
      random: uint32 (size,). The upper bits round ``nu``, the lower 16 round ``mu``.
      bits: of a code; 8 for ``ratio``, 6 for ``ratio6`` and 4 for ``ratio4``.
    """
    mu, nu = _to_blocks(mu), _to_blocks(nu)
    random = np.pad(random, (0, mu.size - random.size)).reshape(mu.shape)
    codes, (scales,), nu_codes, words = _quantize_ratios([mu], nu, random, mu, bits)
    return _kind(RatioState, bits)(codes[0], nu_codes, scales, words)


def _quantize_ratios(firsts, nu, random, active, num_bits):
    """Codes and scales of each first moment, and codes and words of the second moments.

    All are blocks; `active` is 0 where an element is idle.
    """
    row = _CODES[num_bits]
    nu = np.minimum(nu, np.float32(2.0**row.largest))
    # The window reaches from the largest second moment to the smallest, both as the integers of
    # their bits, which have the order of the floats.
    bits = nu.view(np.int32).astype(np.int64)
    top = bits.max(axis=1, initial=0)
    idle_limit = (top - _IDLE_RANGE)[:, None]
    low = np.where(active == 0, np.maximum(bits, idle_limit), bits)
    bottom = np.where(bits > 0, low, _INFINITY).min(axis=1, initial=_INFINITY)
    span = np.maximum(top - bottom, 0)
    span += sum(span // part for part in row.ends)  # leaves some codes at both ends
    steps = np.array([quarters << e for e in range(9) for quarters in range(4, 8)])
    steps = steps[steps < row.coarsest]
    fits = span[:, None] < row.number * steps << 14
    steps = np.where(fits.any(axis=1), steps[fits.argmax(axis=1)], row.coarsest)
    # Division by the step is multiplication by a reciprocal that is slightly too large.
    shift = 12 + np.frexp(steps)[1].astype(np.int64)
    reciprocal = -(-(1 << (32 + shift)) // (steps << 14))
    offset = np.maximum((top * reciprocal >> 32 + shift) - row.top, 0)
    has_zeros = np.where((bits == 0).any(axis=1), row.has_zeros, 0)
    words = (offset << 16 | has_zeros | steps).astype(np.uint32)

    # Second moments: values below the lowest code take that one. Random bits are added before the
    # division rounds down.
    above = np.maximum(bits - (offset * steps << 14)[:, None], (steps << 14)[:, None])
    shift, reciprocal = shift[:, None], reciprocal[:, None]
    divided = (above * reciprocal >> 32) + (random.astype(np.int64) >> 32 - shift)
    nu_codes = np.where(bits == 0, 0, divided >> shift).astype(np.uint8)

    # First moments in units of the stored second moments' square roots.
    _, reciprocal = ratio_unit(_decode_ratio_nu(nu_codes, words, num_bits))
    codes, scales = [], []
    for place, mu in enumerate(firsts):
        with np.errstate(over="ignore"):
            ratio = np.where(nu_codes == 0, np.float32(0), mu * reciprocal)
        stored = _quantize_squares(
            ratio, random_of(place, random), num_bits, least=2.0**-64, largest=2.0**32
        )
        codes.append(stored[0].ravel())
        scales.append(stored[1])
    return codes, scales, nu_codes.ravel(), words.view(np.float32)


def _quantize_squares(x, random, num_bits: int, least: float, largest: float):
    """Rounds blocks to squares of integers of either sign, times the scale of the block."""
    squares = _CODES[num_bits].squares
    magnitude = np.minimum(np.abs(x), np.float32(largest))
    scales = magnitude.max(axis=1, initial=np.float32(0))
    usable = scales >= np.float32(least)
    inverse = np.where(usable, squares * (1 / np.where(usable, scales, np.float32(1))), 0)
    scaled = magnitude * inverse[:, None].astype(np.float32)
    # Up from k^2 if x - k^2 > f (2 k + 1), that is if sqrt(x - 1/4 + h^2) - h > k + 1/2.
    h = (random & np.uint32(0xFFFF)).astype(np.float32) / np.float32(65536) - np.float32(0.5)
    y = (scaled - np.float32(0.25)) + h * h
    level = np.rint(np.sqrt(np.maximum(y, np.float32(2.0**-60))) - h)
    codes = np.where(np.signbit(x), -level, level).astype(np.int8).view(np.uint8)
    return codes & np.uint8(_CODES[num_bits].number - 1), scales


def _dequantize_squares(codes: np.ndarray, scales: np.ndarray, num_bits: int) -> np.ndarray:
    row = _CODES[num_bits]
    sign = row.number // 2  # of two's complement
    k = ((codes.astype(np.int32) ^ sign) - sign).astype(np.float32).reshape(-1, BLOCK_SIZE)
    return k * np.abs(k) * (scales * (np.float32(1) / row.squares))[:, None]


class Squares(NamedTuple):
    """A signed state in the ``ratio`` format, of a rule without second moments.

    Of the rule ``array``, which knows nothing of its states, see `quantize_array`.
    """

    bits = 8
    codes: np.ndarray  # uint8 (num_blocks * 256,), two's complement: -127 .. 127
    scales: np.ndarray  # float32 (num_blocks,)


class Squares6(Squares):
    """The same in ``ratio6``."""

    bits = 6


class Squares4(Squares):
    """The same in ``ratio4``."""

    bits = 4


def quantize_squares(values: np.ndarray, random: np.ndarray, bits: int = 8) -> Squares:
    """Quantizes a flat float32 array block by block, rounding at random without bias.

    Args:
      values: float32 (size,).
      random: uint32 (size,), of which the lower 16 bits count.
      bits: of a code.
    """
    blocks = _to_blocks(values)
    random = np.pad(random, (0, blocks.size - random.size)).reshape(blocks.shape)
    codes, scales = _quantize_squares(blocks, random, bits, least=2.0**-112, largest=2.0**100)
    return _kind(Squares, bits)(codes.ravel(), scales)


def quantize_array(values: np.ndarray, random: np.ndarray, bits: int = 8) -> Squares:
    """Quantizes a flat float32 array of which nothing is known, block by block.

    A block without a negative value is stored as second moments are, and no element of it is idle.
    A bit of its word says so.

    Args:
      values: finite float32 (size,).
      random: uint32 (size,). The upper bits round blocks without a negative value, the lower 16 the
        others.
      bits: of a code.
    """
    signed = quantize_squares(values, random, bits)
    blocks = _to_blocks(values)
    random = np.pad(random, (0, blocks.size - random.size)).reshape(blocks.shape)
    is_window = (blocks >= 0).all(axis=1)
    magnitudes = np.abs(blocks)  # -0 is 0
    _, _, codes, words = _quantize_ratios([], magnitudes, random, magnitudes, bits)
    words = (words.view(np.uint32) | np.uint32(_IS_WINDOW)).view(np.float32)
    chosen = np.where(is_window.repeat(BLOCK_SIZE), codes, signed.codes)
    return _kind(Squares, bits)(chosen, np.where(is_window, words, signed.scales))


def _dequantize_array(codes: np.ndarray, scales: np.ndarray, num_bits: int) -> np.ndarray:
    """Blocks of squares, or of the words of a window where a bit says so."""
    words = scales.view(np.uint32)
    is_window = (words & np.uint32(_IS_WINDOW)) != 0
    squares = _dequantize_squares(codes, np.where(is_window, np.float32(0), scales), num_bits)
    words = np.where(is_window, words & ~np.uint32(_IS_WINDOW), np.uint32(0))
    windows = _decode_ratio_nu(codes.reshape(-1, BLOCK_SIZE), words, num_bits)
    return np.where(is_window[:, None], windows, squares)


class Window(NamedTuple):
    """A state that is never negative in the ``ratio`` format, of a rule without signed states."""

    bits = 8
    codes: np.ndarray  # uint8 (num_blocks * 256,)
    words: np.ndarray  # float32 (num_blocks,); their bits are the words


class Window6(Window):
    """The same in ``ratio6``."""

    bits = 6


class Window4(Window):
    """The same in ``ratio4``."""

    bits = 4


class TwoRatios(NamedTuple):
    """Two signed states and one that is never negative in the ``ratio`` format."""

    bits = 8
    m1_codes: np.ndarray
    m2_codes: np.ndarray
    nu_codes: np.ndarray
    m1_scales: np.ndarray
    m2_scales: np.ndarray
    nu_words: np.ndarray


class TwoRatios6(TwoRatios):
    """The same in ``ratio6``."""

    bits = 6


class TwoRatios4(TwoRatios):
    """The same in ``ratio4``."""

    bits = 4


_SMALL_KINDS = {
    6: {RatioState: RatioState6, Squares: Squares6, Window: Window6, TwoRatios: TwoRatios6},
    4: {RatioState: RatioState4, Squares: Squares4, Window: Window4, TwoRatios: TwoRatios4},
}


def _kind(kind: Any, bits: int) -> Any:
    """The class for states of a kind whose codes have so many bits."""
    return _SMALL_KINDS[bits][kind] if bits in _SMALL_KINDS else kind


def quantize_window(
    values: np.ndarray, random: np.ndarray, directions: np.ndarray, bits: int = 8
) -> Window:
    """Quantizes a flat float32 array block by block, rounding at random without bias.

    Args:
      values: float32 (size,), finite and not negative.
      random: uint32 (size,), of which the upper bits count.
      directions: float32 (size,); an element with the direction 0 is idle.
      bits: of a code.
    """
    blocks = _to_blocks(values)
    random = np.pad(random, (0, blocks.size - random.size)).reshape(blocks.shape)
    _, _, codes, words = _quantize_ratios([], blocks, random, _to_blocks(directions), bits)
    return _kind(Window, bits)(codes, words)


def quantize_two_ratios(m1, m2, nu, random: np.ndarray, bits: int = 8) -> TwoRatios:
    """As `quantize_ratio`, with a second signed state whose random bits are `random_of` it."""
    firsts, nu = [_to_blocks(m1), _to_blocks(m2)], _to_blocks(nu)
    random = np.pad(random, (0, nu.size - random.size)).reshape(nu.shape)
    codes, scales, nu_codes, words = _quantize_ratios(firsts, nu, random, firsts[0], bits)
    kind = _kind(TwoRatios, bits)
    return kind(codes[0], codes[1], nu_codes, scales[0], scales[1], words)


def random_of(place: int, random: np.ndarray) -> np.ndarray:
    """The random bits, in the lower 16, of the signed state at a place among a rule's states."""
    return random + np.uint32(place * 0x85EBCA6B % 2**32)


class Halves(NamedTuple):
    """A state in bfloat16."""

    codes: np.ndarray  # uint16 (num_blocks * 256,): the upper halves of float32


def quantize_halves(values: np.ndarray, random: np.ndarray) -> Halves:
    """Rounds a flat float32 array to bfloat16, at random without bias.

    Args:
      values: finite float32 (size,).
      random: uint32 (size,), of which the lower 16 bits count.
    """
    bits = _to_blocks(values).ravel().view(np.uint32)
    random = np.pad(random & np.uint32(0xFFFF), (0, bits.size - random.size))
    magnitude = np.minimum(bits & np.uint32(0x7FFFFFFF), np.uint32(0x7F7F0000)) + random
    return Halves(((bits & np.uint32(0x80000000) | magnitude) >> np.uint32(16)).astype(np.uint16))


def dequantize_halves(state: Halves) -> np.ndarray:
    """The float32 values, padding included."""
    return (state.codes.astype(np.uint32) << np.uint32(16)).view(np.float32)


def dequantize_ratio(state: RatioState) -> tuple[np.ndarray, np.ndarray]:
    """The float32 moments ``(mu, nu)`` that codes and words stand for, padding included."""
    first = state.mu_codes, state.mu_scales
    mu, nu = _dequantize_ratios([first], state.nu_codes, state.nu_words, state.bits)
    return mu, nu


def _dequantize_ratios(firsts, nu_codes, nu_words, num_bits) -> list[np.ndarray]:
    nu = _decode_ratio_nu(nu_codes.reshape(-1, BLOCK_SIZE), nu_words.view(np.uint32), num_bits)
    unit = ratio_unit(nu)[0]
    squares = [_dequantize_squares(codes, scales, num_bits) for codes, scales in firsts]
    return [*((x * unit).ravel() for x in squares), nu.ravel()]


def ratio_random(leaf_key: int, count: int, size: int) -> np.ndarray:
    """The random bits with which a leaf's moments are rounded, uint32 (size,).

    They are Weyl sequences along the elements (with the plastic number) and along the steps (with
    the golden ratio). The one along the steps starts anew every 128 steps.
    """
    (restart,) = mix(np.array([count >> 7], np.uint32), 0x9E3779B9, 0x7F4A7C15).tolist()
    start = (leaf_key ^ leaf_key >> 32) + count * 0x9E3779B9 + restart
    return np.arange(size, dtype=np.uint32) * np.uint32(0xC13FA9A9) + np.uint32(start % 2**32)


def _decode_ratio_nu(codes: np.ndarray, words: np.ndarray, num_bits: int) -> np.ndarray:
    row, words = _CODES[num_bits], words.astype(np.int64)[:, None]
    is_zero = (codes == 0) & ((words & row.has_zeros) != 0)
    bits = np.where(is_zero, 0, ((words >> 16) + codes) * (words & row.has_zeros - 1) << 14)
    return bits.astype(np.uint32).view(np.float32)


def ratio_unit(nu: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A number near sqrt(nu), 1 or 1.5 times a power of two, and its reciprocal."""
    unit = ((nu.view(np.uint32) >> 1) + 0x1FC00000) & np.uint32(0xFFC00000)
    reciprocal = 0x7F000000 - unit - ((unit >> 22) & 1) * np.uint32(0x155555)
    return unit.view(np.float32), reciprocal.view(np.float32)


def encode(
    states: Sequence[np.ndarray],
    like: Any,
    signed: Sequence[bool],
    random: Any,
    directions: np.ndarray,
) -> Any:
    """Stores the states of a leaf in the format in which `like` stores them.

    Args:
      states: flat float32 arrays.
      like: what was stored so far: a `RatioState`, a `TwoRatios`, or a NamedTuple of a `Quantized`,
        `Squares`, `Window`, `Halves` or an array for each state.
      signed: of each state, whether it can be negative.
      random: function that returns the random bits of the formats that round at random.
      directions: of the step, flat float32.
    """
    if isinstance(like, RatioState):
        mu, nu = states
        return quantize_ratio(mu, nu, random(), like.bits)
    if isinstance(like, TwoRatios):
        m1, m2, nu = states
        return quantize_two_ratios(m1, m2, nu, random(), like.bits)
    return type(like)(*_encode_each(states, like, signed, random, directions))


def _encode_each(states, like, signed, random, directions) -> list[Any]:
    """Each state in a format of its own."""
    encoded = []
    for place, (x, old, sign) in enumerate(zip(states, like, signed, strict=True)):
        if isinstance(old, Squares):
            encoded.append(quantize_squares(x, random(), old.bits))
        elif isinstance(old, Window):
            encoded.append(quantize_window(x, random(), directions, old.bits))
        elif isinstance(old, Halves):
            bits = random_of(place, random()) if sign else random() >> np.uint32(16)
            encoded.append(quantize_halves(x, bits))
        elif isinstance(old, Quantized):
            encoded.append(quantize(x, takes_signed_map(sign, signed)))
        else:
            encoded.append(x)
    return encoded


def takes_signed_map(sign: bool, signed: Sequence[bool]) -> bool:
    """Which ``dynamic`` map a state takes: as in bitsandbytes the signed one if it is alone."""
    return sign or len(signed) == 1


def decode(stored: Any, signed: Sequence[bool], size: int) -> list[np.ndarray]:
    """The states of a leaf of `size` elements, flat float32 arrays; see `encode`."""
    if isinstance(stored, RatioState):
        return [x[:size] for x in dequantize_ratio(stored)]
    if isinstance(stored, TwoRatios):
        firsts = [(stored.m1_codes, stored.m1_scales), (stored.m2_codes, stored.m2_scales)]
        decoded = _dequantize_ratios(firsts, stored.nu_codes, stored.nu_words, stored.bits)
        return [x[:size] for x in decoded]
    decoded = []
    for x, sign in zip(stored, signed, strict=True):
        if isinstance(x, Squares):
            x = _dequantize_array(*x, x.bits).ravel()
        elif isinstance(x, Window):
            x = _dequantize_ratios([], x.codes, x.words, x.bits)[0]
        elif isinstance(x, Halves):
            x = dequantize_halves(x)
        elif isinstance(x, Quantized):
            x = dequantize(x, takes_signed_map(sign, signed))
        decoded.append(x[:size])
    return decoded


def from_arrays(format: str, arrays: Sequence[np.ndarray], signed: Sequence[bool]) -> Any:
    """What `decode` takes, out of the arrays that an arena has of a leaf.

    Args:
      format: a name in `_tables.FORMATS`.
      arrays: the codes of each state, then the words of each state if the format has any.
      signed: of each state, whether it can be negative.
    """
    if format == "float32":
        return tuple(arrays)
    if format == "bfloat16":
        return tuple(map(Halves, arrays))
    kind: Any = Quantized
    if format in RATIO_BITS:
        kind = ratio_kind(signed, RATIO_BITS[format])
        if issubclass(kind, RatioState | TwoRatios):
            return kind(*arrays)
    pairs = zip(arrays[: len(signed)], arrays[len(signed) :], strict=True)
    return tuple(kind(codes, words) for codes, words in pairs)


def to_arrays(stored: Any) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The codes of each state and the words of each state: `from_arrays` the other way round."""
    if isinstance(stored, RatioState | TwoRatios):
        half = len(stored) // 2
        return list(stored[:half]), list(stored[half:])
    codes = [x if isinstance(x, np.ndarray) else x[0] for x in stored]
    return codes, [x[1] for x in stored if isinstance(x, Quantized | Squares | Window)]


def reset(stored: Any, signed: Sequence[bool], mask: np.ndarray) -> Any:
    """What is stored after some elements were set to zero.

    Other elements keep their codes, and what these stand for, to the bit: a block keeps its scale,
    and in the ``ratio`` format its window, which gets a code for zero if it had none. A block of
    zeros alone is stored like one that was never anything else.

    Args:
      stored: as `from_arrays` returns it.
      signed: of each state, whether it can be negative.
      mask: bool (num_blocks * 256,), True for elements to set to zero, and for padding.
    """
    codes, words = to_arrays(stored)
    zero_codes, zero_words = to_arrays(_zero_block(stored, signed))
    blocks = mask.reshape(-1, BLOCK_SIZE)
    format = _format_of(stored)
    if format in RATIO_BITS and not signed[-1]:  # its words tell whether the code 0 stands for zero
        has_zeros = np.uint32(_CODES[RATIO_BITS[format]].has_zeros)
        flags = np.where(blocks.any(axis=1), has_zeros, np.uint32(0))
        words[-1] = (words[-1].view(np.uint32) | flags).view(np.float32)
    elif isinstance(stored, tuple) and isinstance(stored[0], Squares):
        bits = words[0].view(np.uint32)
        has_zeros = _CODES[stored[0].bits].has_zeros
        flags = np.where(blocks.any(axis=1) & (bits >= _IS_WINDOW), has_zeros, 0)
        words[0] = (bits | flags.astype(np.uint32)).view(np.float32)
    codes = [np.where(mask, new[0], old) for old, new in zip(codes, zero_codes, strict=True)]
    is_whole = blocks.all(axis=1)
    words = [np.where(is_whole, new[0], old) for old, new in zip(words, zero_words, strict=True)]
    return from_arrays(format, [*codes, *words], signed)


def _zero_block(like: Any, signed: Sequence[bool]) -> Any:
    """How a block of zeros is stored."""
    zeros, random = np.zeros(BLOCK_SIZE, np.float32), np.zeros(BLOCK_SIZE, np.uint32)
    if isinstance(like, RatioState | TwoRatios):
        return encode([zeros] * len(signed), like, signed, lambda: random, zeros)
    return tuple(_encode_each([zeros] * len(signed), like, signed, lambda: random, zeros))


def _format_of(stored: Any) -> str:
    """The format of what `from_arrays` returned."""
    first = stored if isinstance(stored, RatioState | TwoRatios) else stored[0]
    if isinstance(first, np.ndarray):
        return "float32"
    if isinstance(first, Halves | Quantized):
        return "bfloat16" if isinstance(first, Halves) else "dynamic"
    return next(name for name, bits in RATIO_BITS.items() if bits == first.bits)


RATIO_BITS = {"ratio": 8, "ratio6": 6, "ratio4": 4}  # of a code in these formats
_RATIO_KINDS = {
    (True,): Squares,
    (False,): Window,
    (True, False): RatioState,
    (True, True, False): TwoRatios,
}


def ratio_kind(signed: Sequence[bool], bits: int = 8) -> Any:
    """The class of states in the ``ratio`` format, of one state or of all that a rule has."""
    if tuple(signed) not in _RATIO_KINDS:
        raise NotImplementedError(f"no ratio format for states with signed={tuple(signed)}")
    return _kind(_RATIO_KINDS[tuple(signed)], bits)


def _to_blocks(values: np.ndarray) -> np.ndarray:
    flat = np.asarray(values, np.float32).ravel()
    return np.pad(flat, (0, -flat.size % BLOCK_SIZE)).reshape(-1, BLOCK_SIZE)
