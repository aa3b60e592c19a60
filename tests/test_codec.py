"""The `dynamic` code: C++ and NumPy against brute force.

Both encoders are compared with a search over all 256 values in float64, which knows nothing of
decades, tables of levels or binary search. For the C++ encoder the comparison is complete: see
`test_every_decision`.
"""

import hashlib

import numpy as np
import pytest

from helpers import BLOCK, arena_bytes, f32, hooks, reference, same_bits, split_arena, step_blocks

SMALLEST_NORMAL = f32(2.0**-126)
LARGEST = np.finfo(f32).max
DECADES = [f32(10.0**-i) for i in range(7)]  # where one decade of the map meets the next

signedness = pytest.mark.parametrize("signed", [True, False], ids=["mu", "nu"])


def nearest_codes(x, signed):
    """Codes of ``x`` by trying all values: nearest, ties to the even code, minus sign never 127.

    The distances are exact enough in float64 to be told apart. A tie is a value equal to the middle
    of two neighbours rounded to float32, as in the original: at 99 of 510 middles the exact one is
    just beside it, so that exact arithmetic would call this one float nearer to the odd code.
    """
    table = reference.dynamic_map(signed).astype(np.float64)
    codes = np.empty(x.size, np.int64)
    for start in range(0, x.size, 8192):
        part = x[start : start + 8192].astype(np.float64)
        distances = np.abs(part[:, None] - table)
        nearest = distances.argmin(axis=1)
        distances[np.arange(part.size), nearest] = np.inf
        second = distances.argmin(axis=1)
        middle = ((table[nearest] + table[second]) / 2).astype(f32)
        even = np.where(nearest % 2 == 0, nearest, second)
        codes[start : start + 8192] = np.where(part == middle, even, nearest)
    return np.where(np.signbit(x) & (codes == 127), 126, codes) if signed else codes


def decision_points(signed):
    """For every two neighbouring codes, the float32 middle of their values."""
    table = reference.dynamic_map(signed).astype(np.float64)
    return ((table[:-1] + table[1:]) / 2).astype(f32)


def neighbourhood(x, ulps):
    """Every float from `ulps` below to `ulps` above, of positive floats."""
    bits = np.asarray(x, f32).view(np.int32)[:, None] + np.arange(-ulps, ulps + 1, dtype=np.int32)
    return bits.astype(np.int32).ravel().view(f32)


def edge_values(signed):
    """Where an encoder may turn: ends of intervals with one code, decades, prefixes; all values."""
    middles = decision_points(signed)
    positive = middles[middles > 0]
    table = reference.dynamic_map(signed)
    prefixes = np.arange(0x3F80, dtype=np.int32) << 16  # 0x3F80 begins 1.0
    x = np.concatenate(
        [
            prefixes.view(f32),
            (prefixes + 0xFFFF).view(f32),
            neighbourhood(positive, 1),
            neighbourhood(DECADES, 2),
            neighbourhood(table[table > 0], 2),
            neighbourhood([SMALLEST_NORMAL, np.finfo(f32).smallest_subnormal * f32(3)], 2),
            [0.0, 1.0],
        ]
    ).astype(f32)
    return np.concatenate([x, -x]) if signed else x


def random_values(signed, size):
    """Uniform ones, and ones spread over all binades down to the subnormals."""
    rng = np.random.default_rng(7)
    spread = np.exp2(rng.uniform(-149, 0, size)).astype(f32)
    x = np.concatenate([rng.uniform(0, 1, size).astype(f32), spread])
    return x * rng.choice(np.array([-1, 1], f32), x.size) if signed else x


# -------------------------------------------------------------------------------------- the map


@pytest.mark.parametrize(
    "signed, digest, zero",
    [
        (True, "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c", 127),
        (False, "305f002cc11278fb769d13b25b9fd0c7c83c8402c40a878fe086f4039fde6398", 0),
    ],
    ids=["mu", "nu"],
)
def test_map_is_that_of_bitsandbytes(signed, digest, zero):
    table = reference.dynamic_map(signed)
    assert hashlib.sha256(table.tobytes()).hexdigest() == digest
    assert table[zero] == 0 and table[255] == 1
    assert np.all(np.diff(table) > 0)


@signedness
def test_compiled_map(signed):
    """The C++ values, read from a step: half of a block's only value becomes its next scale."""
    table = reference.dynamic_map(signed)
    codes = {True: np.full((256, BLOCK), 127, np.uint8), False: np.zeros((256, BLOCK), np.uint8)}
    codes[signed][:] = np.arange(256)[:, None]
    scales = np.ones((2, 256), f32)
    arena = np.concatenate(
        [codes[True].ravel(), codes[False].ravel(), scales.view(np.uint8).ravel()]
    )
    grads = np.zeros(256 * BLOCK, f32)
    step_blocks(grads, arena, "dynamic", [(0, 256)], (0.5, 0.5, 1.0, 0.0), 1000)
    _, _, mu_scales, nu_scales = split_arena(arena, 256)
    np.testing.assert_array_equal(2 * (mu_scales if signed else nu_scales), np.abs(table))


# --------------------------------------------------------------------------------- the encoders


@pytest.mark.fast
@signedness
def test_every_decision(signed):
    """All floats in [0, 1] and, for the first moment, [-1, 0], by monotonicity.

    The encoder takes the leading 16 bits for a guess and compares with one constant for each guess,
    so among values with the same leading bits it is monotone. A monotone function that is right at
    both ends of an interval with one code is right on all of it. All these ends are here: the first
    and last float with any 16 leading bits, the decision points, and the floats beside them.
    """
    x = edge_values(signed)
    np.testing.assert_array_equal(hooks.encode(x, signed), nearest_codes(x, signed))


@pytest.mark.slow
@signedness
def test_every_float(signed):
    """The same without the argument, from 2^-24 to 1: codes change at decision points alone."""
    first = int(f32(2.0**-24).view(np.int32))
    last = int(f32(1.0).view(np.int32))
    middles = np.abs(decision_points(signed))
    edges = np.unique(np.concatenate([middles, np.nextafter(middles, f32(2))]))
    for start in range(first, last, 1 << 24):
        x = np.arange(start, min(start + (1 << 24), last) + 1, dtype=np.int32).view(f32)
        for values in (x, -x) if signed else (x,):
            codes = hooks.encode(values, signed)
            changes = np.flatnonzero(codes[1:] != codes[:-1]) + 1
            assert np.isin(x[changes], edges).all()
            ends = values[np.concatenate([[0], changes, changes - 1, [x.size - 1]])]
            np.testing.assert_array_equal(hooks.encode(ends, signed), nearest_codes(ends, signed))


@signedness
def test_random_values(signed):
    x = random_values(signed, 150_000)
    np.testing.assert_array_equal(hooks.encode(x, signed), nearest_codes(x, signed))


@signedness
def test_rounding_above_one(signed):
    """A value times the rounded reciprocal of its scale may exceed 1 a little."""
    x = neighbourhood([1.0], 8)
    np.testing.assert_array_equal(hooks.encode(x, signed), np.full(x.size, 255))


def test_a_minus_sign_is_kept():
    """Also that of -0.0: what underflows still tells its sign."""
    tiny = np.exp2(np.arange(-149, -23, dtype=f32))
    assert np.all(hooks.encode(tiny, True) == 127)
    assert np.all(hooks.encode(-tiny, True) == 126)
    assert hooks.encode(np.array([-0.0, 0.0], f32), True).tolist() == [126, 127]


@signedness
def test_reference_encoder(signed):
    """NumPy's blocks of scale 1 against the same brute force."""
    x = np.concatenate([edge_values(signed), random_values(signed, 50_000)])
    x = x[np.abs(x) <= 1]
    blocks = np.pad(x, (0, -x.size % (BLOCK - 1))).reshape(-1, BLOCK - 1)
    blocks = np.pad(blocks, ((0, 0), (1, 0)), constant_values=1)
    codes, scales = reference.quantize(blocks.ravel(), signed)
    assert np.all(scales == 1)
    np.testing.assert_array_equal(codes, nearest_codes(blocks.ravel(), signed))


# ----------------------------------------------------------------------------- codes and values


@signedness
def test_round_trip(signed):
    """encode(decode(code)) is the code, for all 256 codes (127 decodes to +0)."""
    np.testing.assert_array_equal(
        hooks.encode(reference.dynamic_map(signed), signed), np.arange(256)
    )


@signedness
def test_round_trip_under_any_scale(signed):
    """A block that holds code 255 comes back unchanged from decode, two roundings and encode."""
    rng = np.random.default_rng(3)
    scales = np.exp2(rng.uniform(-100, 127, 2000)).astype(f32)
    codes = np.arange(256, dtype=np.uint8)
    stored = reference.Quantized(np.tile(codes, scales.size), scales)
    again = reference.quantize(reference.dequantize(stored, signed), signed)
    np.testing.assert_array_equal(again.scales, scales)
    np.testing.assert_array_equal(again.codes, stored.codes)


def test_without_code_255_the_scale_shrinks():
    """The map has 1 but no -1: where the largest magnitude is negative, a trip costs it 0.7 %."""
    once = reference.quantize(np.full(BLOCK, -1, f32), signed=True)
    twice = reference.quantize(reference.dequantize(once, signed=True), signed=True)
    assert np.all(once.codes == 0) and np.all(twice.codes == 0)
    assert once.scales[0] == 1
    assert twice.scales[0] == -reference.dynamic_map(True)[0] == f32(0.99296874)


@signedness
@pytest.mark.parametrize("decade", range(7), ids=lambda i: f"1e{i - 7}..1e{i - 6}")
def test_error_bound(decade, signed):
    """At most half a bin, 0.45 / N_i of the decade's upper end, and a few float32 roundings."""
    bins = 2**decade if signed else 2 ** (decade + 1)
    top = 10.0 ** (decade - 6)
    x = np.random.default_rng(decade).uniform(top / 10, top, 20_000).astype(f32)
    x = x * np.resize(np.array([1, -1], f32), x.size) if signed else x
    error = np.abs(reference.dynamic_map(signed)[hooks.encode(x, signed)] - x.astype(np.float64))
    assert error.max() <= 0.45 / bins * top * (1 + 1e-6) + 1e-7 * top
    assert error.max() >= 0.44 / bins * top  # the bound is not idle


def test_error_bound_below_the_decades():
    """Under 1e-7 of the scale a positive value becomes 0, a negative first moment -5.5e-7."""
    x = np.random.default_rng(0).uniform(0, 1e-7, 10_000).astype(f32)
    assert not reference.dynamic_map(True)[hooks.encode(x, True)].any()
    assert not reference.dynamic_map(False)[hooks.encode(x, False)].any()
    smallest = reference.dynamic_map(True)[126]
    assert smallest == pytest.approx(-5.5e-7)
    assert np.all(reference.dynamic_map(True)[hooks.encode(-x, True)] == smallest)


# --------------------------------------------------------------------------------------- blocks
# NumPy's `quantize` and the C++ step must treat the scale alike. With b1 = b2 = 0 a step quantizes
# 0 + g and 0 + g * g.


def blocks_of_step(grads):
    """First and second moments stored by one C++ step over ``grads`` with b1 = b2 = 0."""
    n = -(-grads.size // BLOCK)
    arena = np.zeros(arena_bytes(n, 0), np.uint8)
    hyperparams = (0.0, 0.0, 1e-8, 0.0)
    step_blocks(grads.copy(), arena, "dynamic", [(0, n)], hyperparams, 0, fresh=True)
    mu_codes, nu_codes, mu_scales, nu_scales = split_arena(arena, n)
    return reference.Quantized(mu_codes, mu_scales), reference.Quantized(nu_codes, nu_scales)


def one_block(values):
    return np.resize(np.array(values, f32), BLOCK)


BLOCKS = {
    "zeros": np.zeros(BLOCK, f32),
    "negative zeros": -np.zeros(BLOCK, f32),
    "smallest normal scale": one_block([SMALLEST_NORMAL, 0, -SMALLEST_NORMAL / 2, 1e-44]),
    "largest subnormal scale": one_block([np.nextafter(SMALLEST_NORMAL, f32(0)), -1e-40, 0]),
    "smallest subnormal": one_block([0, -1e-45, 1e-45]),
    "1e38": one_block([1e38, -1e38, 3e37, 1e30, -1, 0]),
    "largest float": one_block([LARGEST, -LARGEST, LARGEST / 2, 1e-7 * LARGEST, 1e31, -1e-45]),
    "partial, 1": np.array([-3.0], f32),
    "partial, 257": np.linspace(-1, 1, 257, dtype=f32),
    "partial, 300": np.linspace(0, 1e-3, 300, dtype=f32),
    "empty": np.zeros(0, f32),
}


@pytest.mark.fast
@pytest.mark.parametrize("grads", BLOCKS.values(), ids=BLOCKS)
def test_blocks(grads):
    values = np.pad(grads, (0, -grads.size % BLOCK)).reshape(-1, BLOCK)
    scales = np.abs(values).max(axis=1, initial=0)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.where(scales < SMALLEST_NORMAL, f32(0), f32(1) / scales)
    expected = nearest_codes((values * inverse[:, None]).ravel(), signed=True)

    quantized = reference.quantize(grads, signed=True)
    np.testing.assert_array_equal(quantized.codes, expected)
    same_bits(quantized.scales, scales)

    with np.errstate(over="ignore"):
        squares = grads * grads
    if np.isfinite(squares).all():
        for stored, values, signed in zip(
            blocks_of_step(grads), (f32(0) + grads, squares), (True, False), strict=True
        ):
            quantized = reference.quantize(values, signed)
            np.testing.assert_array_equal(stored.codes, quantized.codes)
            same_bits(stored.scales, quantized.scales)


@signedness
def test_subnormal_scale_counts_as_zero(signed):
    """Its reciprocal would overflow. The scale is stored all the same."""
    block = one_block([np.nextafter(SMALLEST_NORMAL, f32(0)), 0, 1e-40])
    codes, scales = reference.quantize(block, signed)
    assert np.all(codes == (127 if signed else 0))
    assert scales[0] == block[0]


def test_neighbouring_blocks_have_their_own_scale():
    x = np.concatenate([np.full(BLOCK, 1e30, f32), np.full(BLOCK, 1e-30, f32), np.full(3, -7, f32)])
    codes, scales = reference.quantize(x, signed=True)
    np.testing.assert_array_equal(scales, np.array([1e30, 1e-30, 7], f32))
    assert codes.size == 3 * BLOCK
    assert np.all(codes[: 2 * BLOCK] == 255) and np.all(codes[2 * BLOCK :][:3] == 0)
    assert np.all(codes[2 * BLOCK + 3 :] == 127)  # the padding is zero
