"""Candidate formats for Adam's moments, as `benchmarks/numerics.py` compares them.

A format is defined by what it does to moments. `Format.store` maps float32 moments to the moments
that a reader of the stored bytes would see. So candidates need no bytes, no kernel and nothing of
the package, and run in JAX at the speed of the device. Arrays have shape (blocks, 256), with the
elements of a block in storage order. A format with smaller blocks cuts them.

`m` and `v` are the first and second moment.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

GOLDEN = np.uint32(0x9E3779B9)  # 2^32 times the golden ratio's fraction
INFINITY = 0x7F800000


def bits_of(x):
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def float_of(bits):
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


# --------------------------------------------------------------------------------- random numbers


def _mix(x):
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)


def independent(shape, step):
    """Returns 32 random bits an element, independent at every step."""
    index = jnp.arange(np.prod(shape), dtype=jnp.uint32).reshape(shape)
    return _mix(_mix(index) ^ _mix(jnp.asarray(step, jnp.uint32) * GOLDEN + np.uint32(1)))


def _rhythm(step):
    """Spreads evenly over the steps, anew every 128 of them because gradients may repeat too."""
    step = jnp.asarray(step, jnp.uint32)
    return step * GOLDEN + _mix((step >> 7) + np.uint32(1))


def golden(shape, step):
    """Draws bits that spread evenly over the elements of a step and the steps of an element.

    Along both it is a Weyl sequence, with the plastic number and the golden ratio. Of n draws in a
    row, about n p fall below p, with an error of order log n instead of sqrt(n).
    """
    index = jnp.arange(np.prod(shape), dtype=jnp.uint32).reshape(shape)
    return index * np.uint32(0xC13FA9A9) + _rhythm(step)


def hashed_golden(shape, step):
    """Draws as `golden` does along the steps, but from a hash of the element."""
    index = jnp.arange(np.prod(shape), dtype=jnp.uint32).reshape(shape)
    return _mix(index + np.uint32(1)) + _rhythm(step)


def unbroken_golden(shape, step):
    """Draws as `golden` does, but never starts anew."""
    index = jnp.arange(np.prod(shape), dtype=jnp.uint32).reshape(shape)
    return index * np.uint32(0xC13FA9A9) + jnp.asarray(step, jnp.uint32) * GOLDEN


def _fraction(word):
    """Returns the upper 24 of 32 random bits as a number in [0, 1)."""
    return (word >> 8).astype(jnp.float32) * np.float32(2.0**-24)


# ------------------------------------------------------------------- tables, as functions of [0, 1]


def dynamic_levels(signed: bool) -> np.ndarray:
    """Returns the map of bitsandbytes: 7 decades, each with more levels than the one below."""
    positive = []
    for decade in range(7):
        bins = 2 ** (decade + (not signed))
        edges = np.linspace(0.1, 1, bins + 1)
        positive += list((edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - 6))
    negative = [-x for x in positive] if signed else []
    return np.sort(np.array([*negative, 0.0, *positive, 1.0]))


def softsign_levels() -> np.ndarray:
    y = np.arange(-127, 128) / 127
    return y / (2 - np.abs(y))


def logarithmic_levels(octaves: float, zero: bool) -> np.ndarray:
    steps = 254 if zero else 255
    levels = 2.0 ** (-octaves * np.arange(steps, -1, -1) / steps)
    return np.array([0.0, *levels]) if zero else levels


def power_levels(exponent: float) -> np.ndarray:
    return (np.arange(256) / 255) ** exponent


# ------------------------------------------------------------------------------ formats of a moment
# Each is a function of moments (blocks, block) and of random bits; None means the nearest value.


def _between(low, high, x, word):
    """Rounds `x` to its neighbour `low` or `high`: the nearer, or at random with mean x."""
    share = (x - low) / (high - low)
    return jnp.where(share > (0.5 if word is None else _fraction(word)), high, low)


def _block_scale(x, scale_bits: int):
    """Returns the largest magnitude, rounded up to what a scale of that many bits can hold."""
    scale = jnp.max(jnp.abs(x), axis=1, keepdims=True)
    drop = np.int32((1 << (32 - scale_bits)) - 1)
    return float_of((bits_of(scale) + drop) & ~drop)


def table(levels: np.ndarray, scale_bits: int = 32, negative_zero: float | None = None):
    """Stores levels times the block's largest magnitude."""
    levels = levels.astype(np.float32)

    def store(x, word, idle=None):
        del idle
        scale = _block_scale(x, scale_bits)
        y = x / jnp.where(scale > 0, scale, 1)
        below = jnp.searchsorted(jnp.asarray(levels), y, side="right") - 1
        below = jnp.clip(below, 0, len(levels) - 2)
        stored = _between(jnp.asarray(levels)[below], jnp.asarray(levels)[below + 1], y, word)
        if negative_zero is not None:  # the original never turns a negative value into 0
            stored = jnp.where((y < 0) & (stored == 0), negative_zero, stored)
        return jnp.where(scale > 0, stored * scale, 0)

    return store


def squares(scale_bits: int = 32, largest: int = 127):
    """Stores codes -127 .. 127: code k means k |k| / 127^2 of the block's largest magnitude."""

    def store(x, word):
        scale = _block_scale(x, scale_bits)
        scale = jnp.where(scale >= 2.0**-64, scale, 0)  # a smaller update moves no parameter
        y = jnp.abs(x) * (float(largest) ** 2 / jnp.where(scale > 0, scale, jnp.inf))
        k = jnp.clip(jnp.floor(jnp.sqrt(y)), 0, largest - 1)
        stored = _between(k * k, (k + 1) * (k + 1), y, word)
        return jnp.sign(x) * stored * (scale / np.float32(float(largest) ** 2))

    return store


def powers(largest: int, exponent: float):
    """Stores codes -largest .. largest: code k means (k / largest)^exponent of the block's scale.

    Few codes leave out more of what is small if they stand for squares. They are rounded at random.
    """

    def store(x, word):
        scale = _block_scale(x, 32)
        y = jnp.abs(x) / jnp.where(scale > 0, scale, jnp.inf)
        k = jnp.clip(jnp.floor(y ** (1 / exponent) * largest), 0, largest - 1)
        stored = _between((k / largest) ** exponent, ((k + 1) / largest) ** exponent, y, word)
        return jnp.sign(x) * stored * scale

    return store


def window(
    codes: int = 256,
    idle_octaves: int | None = 15,
    parts: int = 4,
    coarsest: int = 21,
    spare: int = 4,
    finest: int = 16,
):
    """Stores second moments as floats with as many bits of fraction as the block's range allows.

    A code and an offset, times a step, are the bits of a float32. The step is the least with which
    the codes reach from the block's largest value to its smallest above 0 (0 has its own code).
    Steps are 2^finest .. 2^coarsest; with four parts also 1.25, 1.5 and 1.75 times these. No scale
    multiplies the values, so a block's grid stays where it is when its maximum moves. With one
    part, a finer grid contains the coarser ones. Random bits that are added before the division
    round without bias, because floats of an octave are evenly spaced.

    Values below the window take its lowest code. Idle elements are those with m = 0, whose v decays
    forever. They widen the window no further than `idle_octaves`. `spare` codes are for 0 and for
    what is rounded up.
    """
    steps = [
        (1 << shift) * (parts + part) // parts
        for shift in range(finest, coarsest)
        for part in range(parts)
    ]
    steps = jnp.array([*steps, 1 << coarsest], jnp.int32)

    def store(v, word, idle):
        bits = bits_of(v)
        top = jnp.max(bits, axis=1, keepdims=True)
        low = jnp.where(bits > 0, bits, INFINITY)
        if idle_octaves is not None:
            low = jnp.where(idle, jnp.maximum(low, top - (idle_octaves << 23)), low)
        span = jnp.maximum(top - jnp.min(low, axis=1, keepdims=True), 0)
        coarser = jnp.sum(span > (codes - spare - 1) * steps, axis=1, keepdims=True)
        step = steps[jnp.minimum(coarser, len(steps) - 1)]
        share = 0.5 if word is None else _fraction(word)
        cut = bits // step
        cut += (bits % step) > (share * step).astype(jnp.int32)
        cut = jnp.clip(cut, top // step - (codes - spare), INFINITY // step - 1)
        return jnp.where(v > 0, float_of(cut * step), 0.0)

    return store


def tapered(segments=((8, 19), (8, 20), (8, 21), (15, 22))):
    """Stores as `window` does, but with fixed (octaves, shift) from the maximum's octave down."""

    def store(v, word, idle):
        del idle
        bits = bits_of(v)
        top = ((jnp.max(bits, axis=1, keepdims=True) >> 23) + 1) << 23
        shift, depth = jnp.full_like(bits, segments[0][1]), 0
        for (octaves, _), (_, coarser) in zip(segments[:-1], segments[1:], strict=True):
            depth += octaves
            shift = jnp.where(top - bits > depth << 23, coarser, shift)
        depth += segments[-1][0]
        one = jnp.int32(1) << shift
        added = one >> 1 if word is None else (word >> (32 - shift).astype(jnp.uint32))
        cut = jnp.minimum((bits + added.astype(jnp.int32)) >> shift, 0x7F7FFFFF >> shift) << shift
        lowest = jnp.maximum(top - (depth << 23), 1 << 22)
        low = _between(jnp.zeros_like(v), float_of(lowest), v, word)
        return jnp.where(bits < lowest, low, float_of(cut))

    return store


def root_unit(v):
    """Returns 1 or 1.5 times a power of two near sqrt(v), and its reciprocal; v >= 0."""
    unit = ((bits_of(v) >> 1) + 0x1FC00000) & ~0x3FFFFF
    reciprocal = 0x7F000000 - unit - ((unit >> 22) & 1) * 0x155555
    return float_of(unit), float_of(reciprocal)


# ----------------------------------------------------------------------------------- whole formats


@dataclasses.dataclass(frozen=True)
class Format:
    name: str
    bytes_per_parameter: float
    m: Callable
    v: Callable
    m_block: int
    v_block: int
    relative: bool  # m is stored as a multiple of root_unit(stored v)
    m_random: Callable | None = None
    v_random: Callable | None = None

    def store(self, m, v, step):
        """Returns the moments after a write and a read. `step` tells steps apart."""
        shape = m.shape

        def blocks(x, size):
            return x.reshape(-1, size)

        def random(draw, size):
            return None if draw is None else draw((m.size // size, size), step)

        idle = blocks(m == 0, self.v_block)
        word = random(self.v_random, self.v_block)
        v = self.v(blocks(v, self.v_block), word, idle).reshape(shape)
        unit, reciprocal = root_unit(v) if self.relative else (1.0, 1.0)
        ratio = jnp.where(v > 0, m * reciprocal, 0) if self.relative else m
        word = random(self.m_random, self.m_block)
        # One draw serves both moments: v takes its upper half, m the lower one.
        if word is not None:
            word = (word << 16) | (word >> 16)
        return self.m(blocks(ratio, self.m_block), word).reshape(shape) * unit, v


def scale_bytes(m_block, m_bytes, v_block, v_bytes):
    return 2 + m_bytes / m_block + v_bytes / v_block


_DYNAMIC_M, _DYNAMIC_V = table(dynamic_levels(True), negative_zero=-5.5e-7), dynamic_levels(False)
_NEAREST = {}
_STOCHASTIC = {"m_random": independent, "v_random": independent}
_STOCHASTIC_V = {"v_random": independent}
_GOLDEN = {"m_random": golden, "v_random": golden}


def _format(name, m, v, rounding, m_block=256, v_block=256, scale_bits=(32, 32), relative=False):
    size = 2 + scale_bits[0] / 8 / m_block + scale_bits[1] / 8 / v_block
    return Format(name, size, m, v, m_block, v_block, relative, **rounding)


def _softsign(name, levels, rounding, m_block, v_block):
    m, v = table(softsign_levels(), 16), table(levels, 16)
    return _format(name, m, v, rounding, m_block, v_block, (16, 16))


def _ratio(name, rounding, v=None, **kwargs):
    return _format(name, squares(), v or window(), rounding, relative=True, **kwargs)


def four_bit_levels() -> np.ndarray:
    """Returns the signed map of 4 bits of torchao and lpmm, 3 decades like those of `dynamic`."""
    positive = []
    for decade in range(3):
        edges = np.linspace(0.1, 1, 2**decade + 1)
        positive += list((edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - 2))
    return np.sort(np.array([*(-x for x in positive), 0.0, *positive, 1.0]))


FLOAT32 = Format("float32", 8, lambda m, word: m, lambda v, word, idle: v, 256, 256, False)
BASELINE = _format("dynamic (bitsandbytes)", _DYNAMIC_M, table(_DYNAMIC_V), _NEAREST)
WINNER = _ratio("ratio", _GOLDEN)
_LOG, _LOG0 = logarithmic_levels(50, zero=False), logarithmic_levels(50, zero=True)
FORMATS = [
    BASELINE,
    _format("dynamic, stochastic", _DYNAMIC_M, table(_DYNAMIC_V), _STOCHASTIC),
    _format("dynamic m, sqrt v, stochastic", _DYNAMIC_M, table(_DYNAMIC_V**2), _STOCHASTIC),
    _softsign("softsign/128, log v", _LOG0, _NEAREST, 128, 256),
    _softsign("softsign/128, log v, v stochastic", _LOG0, _STOCHASTIC_V, 128, 256),
    _softsign("softsign/128, log v, no 0, v stoch.", _LOG, _STOCHASTIC_V, 128, 256),
    _softsign("softsign/32, sqrt v/32", power_levels(2), _NEAREST, 32, 32),
    _softsign("softsign/32, sqrt v/32, v stochastic", power_levels(2), _STOCHASTIC_V, 32, 32),
    _format("dynamic m, window v, stochastic", _DYNAMIC_M, window(), _STOCHASTIC),
    _format("squares m, window v, stochastic", squares(), window(), _STOCHASTIC),
    _ratio("ratio m, tapered v, stochastic", _STOCHASTIC, tapered()),
    _ratio("ratio m, window v, nearest", _NEAREST),
    _ratio("ratio m, window v, stochastic", _STOCHASTIC),
    _ratio("ratio, idle elements widen", _GOLDEN, window(idle_octaves=None)),
    _format(
        "ratio/128, scales of 14 + 18 bits",
        squares(14),
        window(),
        _GOLDEN,
        128,
        128,
        (14, 18),
        True,
    ),
    _ratio("ratio, m nearest", {"v_random": golden}),
    _ratio("ratio, steps of powers of 2", _GOLDEN, window(parts=1)),
    _format(
        "ratio, 7.5 + 8.5 bits",
        squares(largest=90),
        window(codes=362, idle_octaves=11),
        _GOLDEN,
        relative=True,
    ),
    _ratio("ratio, unbroken sequence", {"m_random": unbroken_golden, "v_random": unbroken_golden}),
    _ratio("ratio, hashed elements", {"m_random": hashed_golden, "v_random": hashed_golden}),
    WINNER,
]

# Fewer than 8 bits a moment: `benchmarks/below8.py` trains with the first five. The second one is
# the package's `ratio6`, whose steps end at 2^23. The fourth one is that of torchao's AdamW4bit
# (torchao/optim/subclass_4bit.py), which took its maps from lpmm: B. Li, J. Chen, J. Zhu, "Memory
# Efficient Optimizers with 4-bit States", 2023 (arXiv:2309.01507). Its second moments have 16
# values evenly spaced, without 0. The last two are other steps for the second one.
_SMALL = {"coarsest": 25, "spare": 3}


def _packed(bits, name, **steps):
    m, v = squares(largest=2 ** (bits - 1) - 1), window(2**bits, spare=3, **steps)
    return Format(name, bits / 4 + 8 / 256, m, v, 256, 256, True, golden, golden)


SMALL_FORMATS = [
    Format(
        "ratio, 6 + 6 bits",
        *(1.5 + 8 / 256, powers(31, 1.5), window(64, **_SMALL), 256, 256, True, golden, golden),
    ),
    _packed(6, "ratio, 6 + 6 bits, squares", coarsest=25),
    Format(
        "ratio, 4 + 4 bits /64",
        *(1 + 8 / 64, powers(7, 1.5), window(16, **_SMALL), 64, 64, True, golden, golden),
    ),
    Format(
        "torchao, 4 + 4 bits /128",
        *(1 + 8 / 128, table(four_bit_levels()), table(np.arange(1, 17) / 16), 128, 128, False),
    ),
    _packed(4, "ratio, 4 + 4 bits, squares", coarsest=25),
    _packed(6, "ratio, 6 + 6 bits, steps of 2^18 on", finest=18, coarsest=23),
    _packed(6, "ratio, 6 + 6 bits, steps of powers of 2", coarsest=25, parts=1),
]
