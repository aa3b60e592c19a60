"""The specification of the 8-bit codes, of the step and of rounded parameters, in NumPy.

An independent path to the same bits as the C++ code: the CPU and the GPU implementation must
agree with it exactly. Written to be read; never on a hot path.

References:
  Dettmers et al., `8-bit Optimizers via Block-wise Quantization
  <https://arxiv.org/abs/2110.02861>`_, 2022; Kingma & Ba, `Adam: A Method for Stochastic
  Optimization <https://arxiv.org/abs/1412.6980>`_, 2015.
"""

import functools
from typing import NamedTuple

import numpy as np

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
    """Quantizes a flat float32 array block by block: nearest value, ties to the even code.

    Negative first moments never take the code of zero; blocks whose largest magnitude is
    subnormal count as zero.
    """
    blocks = _to_blocks(values)
    scales = np.max(np.abs(blocks), axis=1, initial=np.float32(0))
    usable = scales >= _SMALLEST_NORMAL
    inverse = np.where(usable, np.float32(1) / np.where(usable, scales, 1), np.float32(0))
    x = blocks * inverse[:, None].astype(np.float32)
    table = dynamic_map(signed)
    middles = (table[:-1] + table[1:]) * np.float32(0.5)
    below = np.searchsorted(middles, x, side="left")  # a value on a middle stays below it ...
    above = np.searchsorted(middles, x, side="right")  # ... or goes above it
    codes = np.where(below % 2 == 0, below, above)
    if signed:
        codes = np.where(np.signbit(x) & (codes == 127), 126, codes)
    return Quantized(codes.astype(np.uint8).ravel(), scales)


def dequantize(quantized: Quantized, signed: bool) -> np.ndarray:
    """The float32 values that codes and scales stand for, padding included."""
    blocks = dynamic_map(signed)[quantized.codes].reshape(-1, BLOCK_SIZE)
    return (blocks * quantized.scales[:, None]).ravel()


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
    before = _mix(np.array([count], np.uint32), 0x9E3779B9, 0x7F4A7C15)
    between = _mix(np.array([count], np.uint32), 0xBF58476D, 0x94D049BB)
    return random_bits_from((before, between), leaf_key, start, size)


def random_bits_from(keys, leaf_key: int, start: int, size: int) -> np.ndarray:
    """`random_bits` from two words in place of those that a step gives."""
    before, between = (np.asarray(key, np.uint32) for key in keys)
    leaf_key %= 2**64
    index = np.uint64(start) + np.arange(size, dtype=np.uint64)
    place = (index >> np.uint64(32)).astype(np.uint32) * np.uint32(0x9E3779B1)
    place ^= np.uint32(leaf_key // 2**32)
    before = before ^ np.uint32(leaf_key % 2**32) ^ place * np.uint32(0xC2B2AE3D)
    between = between ^ place
    return _mix(index.astype(np.uint32), before, between)


def _mix(x: np.ndarray, before, between) -> np.ndarray:
    x = x ^ np.asarray(before, np.uint32)
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15)) ^ np.asarray(between, np.uint32)) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


class RatioState(NamedTuple):
    """Moments of a leaf in the ``ratio`` code; blocks of 256 codes, two words a block.

    Code 0 is zero for both moments, so a fresh state is all zero bytes.
    """

    mu_codes: np.ndarray  # uint8 (num_blocks * 256,), two's complement: -127 .. 127
    nu_codes: np.ndarray  # uint8 (num_blocks * 256,)
    mu_scales: np.ndarray  # float32 (num_blocks,)
    nu_words: np.ndarray  # float32 (num_blocks,), of which the bits count


_COARSEST_STEP = 128  # in units of 2^14
_TOP_CODE = 253
_IDLE_RANGE = 15 << 23
_HAS_ZEROS = 256
_INFINITY = 0x7F800000
_SQUARES = np.float32(16128.99)  # 127^2, and a little less so that no ratio reaches it


def quantize_ratio(mu: np.ndarray, nu: np.ndarray, random: np.ndarray) -> RatioState:
    """Quantizes flat float32 moments block by block, rounding at random without bias.

    Args:
      mu: first moments (size,).
      nu: second moments (size,), finite and not negative.
      random: uint32 (size,), of which the upper bits round ``nu`` and the lower 16 ``mu``.
    """
    mu, nu = _to_blocks(mu), np.minimum(_to_blocks(nu), np.float32(2.0**127))
    random = np.pad(random, (0, mu.size - random.size)).reshape(mu.shape)

    # The window: from the largest second moment to the smallest, in bits, which order floats.
    bits = nu.view(np.int32).astype(np.int64)
    top = bits.max(axis=1, initial=0)
    idle_limit = (top - _IDLE_RANGE)[:, None]
    low = np.where(mu == 0, np.maximum(bits, idle_limit), bits)
    bottom = np.where(bits > 0, low, _INFINITY).min(axis=1, initial=_INFINITY)
    span = np.maximum(top - bottom, 0)
    span += span // 64 + span // 256  # so much of the codes is left for the ends
    steps = np.array([quarters << e for e in range(5) for quarters in range(4, 8)])
    fits = span[:, None] < 256 * steps << 14
    steps = np.where(fits.any(axis=1), steps[fits.argmax(axis=1)], _COARSEST_STEP)
    # Division by the step: multiplication by a reciprocal that is hardly too large.
    shift = 12 + np.frexp(steps)[1].astype(np.int64)
    reciprocal = -(-(1 << (32 + shift)) // (steps << 14))
    offset = np.maximum((top * reciprocal >> 32 + shift) - _TOP_CODE, 0)
    has_zeros = np.where((bits == 0).any(axis=1), _HAS_ZEROS, 0)
    words = (offset << 16 | has_zeros | steps).astype(np.uint32)

    # Second moments: what is below the lowest code takes that one; random bits, then the division.
    above = np.maximum(bits - (offset * steps << 14)[:, None], (steps << 14)[:, None])
    shift, reciprocal = shift[:, None], reciprocal[:, None]
    divided = (above * reciprocal >> 32) + (random.astype(np.int64) >> 32 - shift)
    nu_codes = np.where(bits == 0, 0, divided >> shift).astype(np.uint8)

    # First moments: squares of integers, in units of the stored second moments' square roots.
    _, reciprocal = _ratio_unit(_decode_ratio_nu(nu_codes, words))
    with np.errstate(over="ignore"):
        ratio = np.where(nu_codes == 0, np.float32(0), mu * reciprocal)
    magnitude = np.minimum(np.abs(ratio), np.float32(2.0**32))
    scales = magnitude.max(axis=1, initial=np.float32(0))
    usable = scales >= np.float32(2.0**-64)
    inverse = np.where(usable, _SQUARES * (1 / np.where(usable, scales, np.float32(1))), 0)
    x = magnitude * inverse[:, None].astype(np.float32)
    # Up from k^2 if x - k^2 > f (2 k + 1), that is if sqrt(x - 1/4 + h^2) - h > k + 1/2.
    h = (random & np.uint32(0xFFFF)).astype(np.float32) / np.float32(65536) - np.float32(0.5)
    y = (x - np.float32(0.25)) + h * h
    level = np.rint(np.sqrt(np.maximum(y, np.float32(2.0**-60))) - h)
    mu_codes = np.where(np.signbit(ratio), -level, level).astype(np.int8).view(np.uint8)
    return RatioState(mu_codes.ravel(), nu_codes.ravel(), scales, words.view(np.float32))


def dequantize_ratio(state: RatioState) -> tuple[np.ndarray, np.ndarray]:
    """The float32 moments ``(mu, nu)`` that codes and words stand for, padding included."""
    nu = _decode_ratio_nu(state.nu_codes.reshape(-1, BLOCK_SIZE), state.nu_words.view(np.uint32))
    k = state.mu_codes.view(np.int8).astype(np.float32).reshape(nu.shape)
    step = state.mu_scales * (np.float32(1) / _SQUARES)
    return (k * np.abs(k) * step[:, None] * _ratio_unit(nu)[0]).ravel(), nu.ravel()


def ratio_random(leaf_key: int, count: int, size: int) -> np.ndarray:
    """The random bits with which a leaf's moments are rounded, uint32 (size,).

    Weyl sequences along the elements (the plastic number) and the steps (the golden ratio), of
    which the latter starts anew every 128 steps.
    """
    (restart,) = _mix(np.array([count >> 7], np.uint32), 0x9E3779B9, 0x7F4A7C15).tolist()
    start = (leaf_key ^ leaf_key >> 32) + count * 0x9E3779B9 + restart
    return np.arange(size, dtype=np.uint32) * np.uint32(0xC13FA9A9) + np.uint32(start % 2**32)


def _decode_ratio_nu(codes: np.ndarray, words: np.ndarray) -> np.ndarray:
    words = words.astype(np.int64)[:, None]
    is_zero = (codes == 0) & ((words & _HAS_ZEROS) != 0)
    bits = np.where(is_zero, 0, ((words >> 16) + codes) * (words & 255) << 14)
    return bits.astype(np.uint32).view(np.float32)


def _ratio_unit(nu: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A number near sqrt(nu), 1 or 1.5 times a power of two, and its reciprocal."""
    unit = ((nu.view(np.uint32) >> 1) + 0x1FC00000) & np.uint32(0xFFC00000)
    reciprocal = 0x7F000000 - unit - ((unit >> 22) & 1) * np.uint32(0x155555)
    return unit.view(np.float32), reciprocal.view(np.float32)


class Hyperparams(NamedTuple):
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    eps_root: float = 0.0


def adam(
    grad,
    mu,
    nu,
    count: int,
    hyperparams: Hyperparams,
    nesterov: bool = False,
    skip_elements: bool = False,
):
    """One Adam step on flat float32 arrays.

    Args:
      grad: gradients.
      mu: first moments before the step.
      nu: second moments before the step.
      count: number of steps already taken.
      hyperparams: b1, b2, eps, eps_root.
      nesterov: whether to use Nesterov momentum (Dozat, 2016).
      skip_elements: whether an element whose gradient cannot be used is skipped.

    Returns:
      ``(update, mu, nu)``, float32. Where a gradient is not finite, or 2^64 and more, so that it
      has no finite square, the update is NaN, or that of a first moment of 0 with
      `skip_elements`, and the moments are unchanged.
    """
    f32 = np.float32
    b1, b2, eps, eps_root = (f32(x) for x in hyperparams)
    if not (0 <= b1 < 1 and 0 <= b2 < 1):  # only a traced value can be: a schedule gone wrong
        return np.full_like(mu, np.nan), mu, nu
    one_minus_b1, one_minus_b2 = f32(1) - b1, f32(1) - b2
    t = count + 1
    c1, c2 = 1.0 - _power(b1, t), 1.0 - _power(b2, t)
    if nesterov:
        mu_scale = f32(float(b1) / (1.0 - _power(b1, t + 1)))
        grad_scale = f32(float(one_minus_b1) / c1)
    else:
        mu_scale, grad_scale = f32(1.0 / c1), f32(0)
    nu_scale = f32(1.0 / c2)
    with np.errstate(all="ignore"):
        new_mu = b1 * mu + one_minus_b1 * grad
        new_nu = b2 * nu + one_minus_b2 * grad * grad
        used = (np.abs(grad) < f32(2.0**64)) & np.isfinite(new_nu)  # and then mu is finite too
        mu_hat = new_mu * mu_scale + grad * grad_scale if nesterov else new_mu * mu_scale
        mu_hat = np.where(used, mu_hat, f32(0 if skip_elements else np.nan))
        new_mu, new_nu = np.where(used, new_mu, mu), np.where(used, new_nu, nu)
        update = mu_hat * (f32(1) / (np.sqrt(new_nu * nu_scale + eps_root) + eps))
    return update, new_mu, new_nu


class ParamHyperparams(NamedTuple):
    learning_rate: float
    weight_decay: float = 0.0


ZERO_RESIDUAL = 128
_POWER = np.float32(2.0**112)  # bits of a float16 behind those of a float32 divided by this


def dropped_bits(dtype) -> int:
    """Bits that a float32 has behind those of a 16-bit type."""
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


def update_params(
    direction: np.ndarray,
    params: np.ndarray,
    residuals: np.ndarray,
    random: np.ndarray,
    hyperparams: ParamHyperparams,
    dtype,
    rounding: str,
    decays: bool = True,
):
    """Updates of one leaf's parameters, all arrays flat.

    Args:
      direction: what `adam` returned.
      params: float32, bfloat16 or float16.
      residuals: uint8, those of the parameters; used for ``"compensated"`` and 16 bits.
      random: uint32, for 16-bit parameters.
      hyperparams: learning rate and weight decay.
      dtype: of the updates.
      rounding: ``"stochastic"`` or ``"compensated"``.
      decays: whether weight decay applies.

    Returns:
      ``(update, residuals)``; the new parameters are ``params + update`` in their own type.
    """
    lr, decay = (np.float32(x) for x in hyperparams)
    decay = decay if decays else np.float32(0)
    param = params.astype(np.float32)
    compensated = rounding == "compensated" and params.dtype != np.float32
    with np.errstate(all="ignore"):
        master = join_master(params, residuals) if compensated else param
        change = -lr * (direction + decay * master)
        if params.dtype == np.float32:
            return change.astype(dtype), residuals
        exact = master + change
        if not compensated:
            rounded = round_stochastically(exact, random, params.dtype)
            return (rounded.astype(np.float32) - param).astype(dtype), residuals
        rounded, residuals = split_master(exact, random, params.dtype)
        update = (rounded.astype(np.float32) - param).astype(dtype)
        landed = (param + update.astype(np.float32)).astype(params.dtype)
    return update, np.where(landed == rounded, residuals, np.uint8(ZERO_RESIDUAL))


class LeafState(NamedTuple):
    """Moments of one leaf: `Quantized` in the ``dynamic`` code, or flat float32 arrays."""

    mu: Quantized | np.ndarray
    nu: Quantized | np.ndarray


def init_leaf(size: int, quantized: bool, codec: str = "dynamic") -> LeafState | RatioState:
    """Moments of zero."""
    zeros = np.zeros(size, np.float32)
    if not quantized:
        return LeafState(zeros, zeros)
    if codec == "ratio":
        return quantize_ratio(zeros, zeros, np.zeros(size, np.uint32))._replace(
            nu_words=np.zeros(-(-size // BLOCK_SIZE), np.float32)
        )
    return LeafState(quantize(zeros, signed=True), quantize(zeros, signed=False))


def step_leaf(
    grad,
    state: LeafState | RatioState,
    count: int,
    hyperparams: Hyperparams,
    nesterov: bool = False,
    *,
    skip_elements: bool = False,
    leaf_key: int = 0,
):
    """One step for one leaf.

    Args:
      grad: gradient of any shape; float32, bfloat16 or float16.
      state: moments before the step.
      count: number of steps already taken.
      hyperparams: b1, b2, eps, eps_root.
      nesterov: whether to use Nesterov momentum.
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
        skip_elements=skip_elements,
        leaf_key=leaf_key,
    )
    with np.errstate(over="ignore"):
        return direction.astype(grad.dtype).reshape(grad.shape), state


def directions(
    grad,
    state: LeafState | RatioState,
    count: int,
    hyperparams: Hyperparams,
    nesterov: bool = False,
    *,
    skip_elements: bool = False,
    leaf_key: int = 0,
):
    """As `step_leaf`, but the update is flat and float32."""
    flat = np.asarray(grad).ravel().astype(np.float32)
    size = flat.size
    if isinstance(state, RatioState):
        mu, nu = (x[:size] for x in dequantize_ratio(state))
        update, mu, nu = adam(flat, mu, nu, count, hyperparams, nesterov, skip_elements)
        state = quantize_ratio(mu, nu, ratio_random(leaf_key, count, size))
    elif isinstance(state.mu, Quantized) and isinstance(state.nu, Quantized):
        mu = dequantize(state.mu, signed=True)[:size]
        nu = dequantize(state.nu, signed=False)[:size]
        update, mu, nu = adam(flat, mu, nu, count, hyperparams, nesterov, skip_elements)
        state = LeafState(quantize(mu, signed=True), quantize(nu, signed=False))
    else:
        update, mu, nu = adam(flat, state.mu, state.nu, count, hyperparams, nesterov, skip_elements)
        state = LeafState(mu, nu)
    return update, state


def _to_blocks(values: np.ndarray) -> np.ndarray:
    flat = np.asarray(values, np.float32).ravel()
    return np.pad(flat, (0, -flat.size % BLOCK_SIZE)).reshape(-1, BLOCK_SIZE)


def _power(base: np.float32, exponent: int) -> float:
    """base ** exponent in float64, by squaring: the order of operations is part of the
    specification."""
    result, square = 1.0, float(base)
    while exponent:
        if exponent & 1:
            result *= square
        square *= square
        exponent >>= 1
    return result
