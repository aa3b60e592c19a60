"""The `ratio6` and `ratio4` codes: what `ratio` promises, with codes of 6 and of 4 bits.

What a code stands for is computed here in exact integer or rational arithmetic, apart from the
reference.
"""

import fractions
from typing import Any, NamedTuple

import numpy as np
import pytest

from helpers import BLOCK, f32, reference

u32 = np.uint32
HAS_ZEROS = 1 << 15


class Code(NamedTuple):
    """What differs between the two."""

    bits: int
    level: int  # the largest of a first moment
    squares: Any  # that, squared, and a little less
    top: int  # code of the largest second moment
    octaves: int  # the coarsest step's
    ends: tuple[int, ...]  # so many parts of a range more than the range have codes
    reach: int  # so many steps in a block at most
    largest: int  # second moment, as bits
    error: tuple[float, float]  # of updates

    @property
    def name(self):
        return f"ratio{self.bits}"

    @property
    def steps(self):
        """Times 2^14."""
        powers = range(int(self.octaves).bit_length() + 6)
        return [q << e for e in powers for q in range(4, 8)] + [self.octaves * 512]


SIX = Code(6, 31, f32(960.9994), 62, 1, (16,), 59, 0x7F000000, (0.01, 0.03))
FOUR = Code(4, 7, f32(48.99997), 14, 4, (4, 16), 12, 0x7D800000, (0.15, 0.4))
CODES = [SIX, FOUR]
every_code = pytest.mark.parametrize("code", CODES, ids=[code.name for code in CODES])
every_step = pytest.mark.parametrize(
    "code, step",
    [pytest.param(code, step, id=f"{code.name}-{step}") for code in CODES for step in code.steps],
)

pytestmark = pytest.mark.fast


def floats(bits):
    return np.asarray(bits, u32).view(f32)


def store(code, mu, nu, random):
    mu, nu = np.broadcast_arrays(f32(mu), f32(nu))
    return reference.quantize_ratio(mu, nu, np.broadcast_to(u32(random), mu.shape), code.bits)


def block_with(code, step, top):
    """Second moments of a block that has this step: the largest one, and the smallest."""
    return floats([top, max(top - step * code.reach * 2**14, 1)])


def code_and_step(state):
    words = state.nu_words.view(u32).astype(np.int64)
    return words >> 16, (words & 0x7FFF) << 14


@every_code
@pytest.mark.parametrize("top", [0x3F800000, 0x3F812345, 0x7D800000, 0x01000000, 0x2000], ids=hex)
@pytest.mark.parametrize("octaves", [0, 0.1, 0.4, 0.9, 1.9, 3.1, 5, 7.8, 12, 15.7, 31.4, 59, 100])
def test_window_is_the_finest_that_reaches(code, top, octaves):
    bottom = max(top - int(octaves * 2**23), 1)
    nu = np.resize(floats([top, bottom]), BLOCK)
    offset, step = (int(x[0]) for x in code_and_step(store(code, nu, nu, 0)))
    span = top - bottom
    all_codes = [(s << 14) << code.bits for s in code.steps]
    with_ends = span + sum(span // part for part in code.ends)
    fits = [codes >> code.bits for codes in all_codes if with_ends < codes]
    assert step == min(fits, default=code.octaves * 2**23)
    if fits:
        assert bottom // step - offset >= (1 if offset else 0)
    assert top // step + 1 - offset <= code.top + 1  # rounding up at the top


@every_step
@pytest.mark.parametrize("top", [0x3F800000, 0x3FFFFFFF, None], ids=["one", "two", "largest"])
def test_what_codes_stand_for_is_stored_again(code, step, top):
    """For any random bits: a second moment that has not changed has no error, and is finite."""
    top = top or code.largest
    ends = block_with(code, step, top)
    nu = np.resize(ends, BLOCK)
    offset, size = (int(x[0]) for x in code_and_step(store(code, nu, nu, 0)))
    assert size == step << 14 or top - step * code.reach * 2**14 < 1
    codes = np.arange(1, code.top + 1)
    bits = (codes + offset) * size
    inside = (bits <= top) & (bits >= int(ends[1:].view(u32)[0]))
    codes, bits = codes[inside], bits[inside]
    assert len(bits) >= min(code.reach - 1, top // size)
    nu[2 : 2 + len(bits)] = floats(bits)
    for random in 0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF:
        state = store(code, nu, nu, random)
        np.testing.assert_array_equal(state.nu_codes[2 : 2 + len(bits)], codes)
        assert (state.nu_codes <= code.top + 1).all()
        mu, decoded = reference.dequantize_ratio(state)
        np.testing.assert_array_equal(decoded[2 : 2 + len(bits)].view(u32), bits)
        assert np.isfinite(mu).all() and np.isfinite(decoded).all()


@every_code
@pytest.mark.parametrize("place", [0, 3, 8, 11, 19, -1])
def test_second_moments_are_rounded_without_bias(code, place):
    """As integers of their bits, over evenly spread random bits."""
    step, draws = code.steps[place], 2**12
    random = (np.arange(draws, dtype=np.uint64) << np.uint64(20)).astype(u32)
    rng = np.random.default_rng(step)
    top = 0x3FFFFFFF if place >= 0 else code.largest
    ends = block_with(code, step, top)
    for bits in rng.integers(int(ends[1:].view(u32)[0]) + (2 * step << 14), top, 3).tolist():
        nu = np.resize(ends, (draws, BLOCK))
        nu[:, 5] = floats(bits)
        state = store(code, nu.ravel(), nu.ravel(), random.repeat(BLOCK))
        codes = state.nu_codes.reshape(-1, BLOCK)[:, 5].astype(np.int64)
        offset, size = code_and_step(state)
        mean = fractions.Fraction(int(((codes + offset) * size).sum()), draws)
        assert abs(mean - bits) <= fractions.Fraction(2 * int(size[0]), draws)
        assert np.unique(codes).size <= 2


@every_step
def test_largest_second_moments_stay_finite(code, step):
    """However they are rounded; and the word is one that may come from a file.

    That of `ratio6` is not in the coarsest step, with a second moment of 2^127.
    """
    lowest = block_with(code, step, code.largest)[1]
    for top in code.largest, code.largest - 1, 0x7F7FFFFF:
        nu = np.resize([floats(top), lowest], BLOCK)
        for random in 0, 0xFFFFFFFF:
            state = store(code, nu, nu, random)
            mu, decoded = reference.dequantize_ratio(state)
            assert np.isfinite(mu).all() and np.isfinite(decoded).all() and (decoded > 0).all()
        offset, size = code_and_step(state)
        if code is FOUR or step < 512:
            assert ((offset + 2**code.bits - 1) * size < 0x7F800000).all()


@every_code
def test_no_ratio_is_above_the_largest_code(code):
    """The largest of a block takes that code: with any scale, and all values of the random bits."""
    scales = (np.arange(2**23, dtype=u32) | u32(0x3F800000)).view(f32)  # exponents change nothing
    scaled = np.unique(scales * (code.squares * (1 / scales)))
    assert code.squares * f32(1 - 1e-6) < scaled[0] and scaled[-1] < code.level**2
    random = np.arange(2**16, dtype=u32)
    for x in scaled:
        scale = scales[np.argmax(scales * (code.squares * (1 / scales)) == x)]
        codes = store(code, np.full(random.size, scale, f32), 1, random).mu_codes
        assert (codes == code.level).all()


@every_code
def test_every_code_of_a_first_moment(code):
    """Code k stands for k |k| / 31^2 of the scale, in two's complement, and is stored again.

    With 4 bits it is 7^2.
    """
    k = np.resize(np.arange(-code.level, code.level + 1), BLOCK)
    for scale in f32(1), f32(0.3), f32(7.1e-5):
        mu = (k * np.abs(k) * scale / f32(code.level**2)).astype(f32)
        for random in 0x4000, 0x8000, 0xC000:
            state = store(code, mu, 1, random)
            expected = k.astype(np.int8).view(np.uint8) & (2**code.bits - 1)
            np.testing.assert_array_equal(state.mu_codes, expected)
            decoded, nu = reference.dequantize_ratio(state)
            assert (nu == 1).all()
            np.testing.assert_allclose(decoded, mu, rtol=1e-6)


@every_code
def test_first_moments_are_rounded_without_bias(code):
    """Over all values of the random bits; the largest one never rounds up."""
    random = np.arange(2**16, dtype=u32)
    rng = np.random.default_rng(0)
    for ratio in [0.0, 1e-9, 1.0, 0.5, *rng.uniform(0, 1, 8), *rng.uniform(0, 1e-2, 8)]:
        mu = np.ones((random.size // 255 + 1, BLOCK), f32)
        bits = np.zeros(mu.shape, u32)
        bits[:, 1:] = np.resize(random, (len(mu), 255))
        mu[:, 1:] = -ratio
        codes = store(code, mu.ravel(), 1, bits.ravel()).mu_codes.reshape(mu.shape)[:, 1:].ravel()
        sign = code.level + 1
        k = ((codes.astype(np.int64) ^ sign) - sign)[: random.size]
        assert -code.level <= k.min() <= k.max() <= 0 and np.unique(k).size <= 2
        mean = fractions.Fraction(-int((k * np.abs(k)).sum()), random.size)
        exact = fractions.Fraction(float(f32(ratio))) * fractions.Fraction(float(code.squares))
        bar = (2 * int(np.abs(k).max()) + 1) * fractions.Fraction(1, 2**16) + exact / 2**21
        assert abs(mean - exact) <= bar


@every_code
def test_zeros_have_a_code_of_their_own(code):
    rng = np.random.default_rng(0)
    nu = rng.uniform(1, 2, 2 * BLOCK).astype(f32)
    nu[3] = 0
    state = store(code, nu, nu, rng.integers(0, 2**32, nu.size, u32))
    assert [word & HAS_ZEROS for word in state.nu_words.view(u32).tolist()] == [HAS_ZEROS, 0]
    np.testing.assert_array_equal(np.flatnonzero(state.nu_codes == 0), [3])
    mu, nu = reference.dequantize_ratio(state)
    assert nu[3] == mu[3] == 0
    assert (np.delete(nu, 3) >= (1 if code.bits == 6 else 0.95)).all()


@every_code
def test_arrays_of_either_sign(code):
    """A block without negative values is a window, the others are squares."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=3 * BLOCK).astype(f32)
    values[BLOCK : 2 * BLOCK] = rng.uniform(0.1, 2, BLOCK)
    values[2 * BLOCK :] = 0
    stored = reference.store_array(values, code.name, 7, 3)
    assert (stored[0].codes < 2**code.bits).all()
    (decoded,) = reference.decode(stored, (True,), values.size)
    bar = 0.07 if code.bits == 6 else 0.4
    assert np.abs(decoded - values)[:BLOCK].max() < bar * np.abs(values).max()
    np.testing.assert_allclose(decoded[BLOCK : 2 * BLOCK], values[BLOCK : 2 * BLOCK], rtol=bar)
    assert not decoded[2 * BLOCK :].any()
    zeros = np.zeros(values.size, bool)
    zeros[BLOCK + 7] = True
    (again,) = reference.decode(reference.reset(stored, (True,), zeros), (True,), values.size)
    decoded[BLOCK + 7] = 0
    np.testing.assert_array_equal(again, decoded)


@every_code
def test_updates_follow_float32(code):
    """About as far as the study's format is from float32 (docs/numerics.md, "varied")."""
    rng = np.random.default_rng(0)
    scale = np.exp(rng.normal(0, 0.7, 4 * BLOCK))
    state = reference.init_leaf(4 * BLOCK, True, code.name)
    exact = reference.init_leaf(4 * BLOCK, False)
    hyperparams = reference.Hyperparams()
    error = energy = 0.0
    for count in range(1000):
        grad = (rng.normal(size=4 * BLOCK) * scale).astype(f32)
        ours, state = reference.step_leaf(grad, state, count, hyperparams, leaf_key=3)
        theirs, exact = reference.step_leaf(grad, exact, count, hyperparams)
        if count >= 700:
            error += np.sum((ours - theirs) ** 2, dtype=np.float64)
            energy += np.sum(theirs**2, dtype=np.float64)
    assert code.error[0] < error / energy < code.error[1]


@every_code
@pytest.mark.parametrize("rule", ["adam", "lion", "rms", "ademamix"])
def test_every_kind_of_states(rule, code):
    """All states are stored with few bits, reset element by element, and read as arrays again."""
    row = reference.RULES[rule]
    state = reference.init_leaf(700, True, code.name, rule)
    rng = np.random.default_rng(0)
    states = [rng.normal(size=700).astype(f32) for _ in row.signed]
    states = [x if sign else x * x for x, sign in zip(states, row.signed, strict=True)]
    random = rng.integers(0, 2**32, 700, u32)
    stored = reference.encode(states, state, row.signed, lambda: random, states[0])
    codes, words = reference.to_arrays(stored)
    assert all((x < 2**code.bits).all() and x.size == 768 for x in codes)
    again = reference.from_arrays(code.name, [*codes, *words], row.signed)
    decoded = reference.decode(stored, row.signed, 700)
    for a, b in zip(reference.decode(again, row.signed, 700), decoded, strict=True):
        np.testing.assert_array_equal(a, b)
    mask = np.arange(768) % 3 == 0
    mask[700:] = True
    after = reference.decode(reference.reset(stored, row.signed, mask), row.signed, 700)
    for a, b in zip(after, decoded, strict=True):
        np.testing.assert_array_equal(a, np.where(mask[:700], 0, b))
