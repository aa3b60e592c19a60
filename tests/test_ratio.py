"""The `ratio` code, and steps of `ratio6` and `ratio4`: C++ and NumPy against what is promised.

What a code stands for is computed here in exact integer or rational arithmetic; that rounding is
without bias is shown by running through all random bits that matter, not by sampling.
"""

import dataclasses
import fractions

import numpy as np
import pytest

from helpers import BLOCK, arena_bytes, f32, hooks, ratio_unit, reference, split_arena, step_blocks

u32 = np.uint32
STEPS = [quarters << e for e in range(5) for quarters in range(4, 8)] + [128]  # times 2^14
LARGEST = 0x7F7FFFFF  # bits of the largest finite float
HAS_ZEROS = 256


def floats(bits):
    return np.asarray(bits, u32).view(f32)


def window_of(top, step):
    """Step, and offset, of a block that has this step of `STEPS` for its range."""
    word = hooks.window_word(top, range_for(step), False)
    assert word & 255 == step
    return step << 14, word >> 16


def range_for(step):
    """A range that takes this step and no finer one."""
    return step * 250 << 14


def encode_nus(bits, top, step, random, has_zeros=False):
    random = np.broadcast_to(u32(random), len(bits))
    return hooks.encode_ratio_nu(floats(bits), top, range_for(step), has_zeros, random)


TOPS = [0x3F800000, 0x3F812345, 0x3FFFFFFF, 0x7F000000, 0x7EFFFFFF, 0x01000000, 0x00800000, 0x2000]
tops = pytest.mark.parametrize("top", TOPS, ids=hex)


@tops
@pytest.mark.parametrize("octaves", [0, 0.9, 1.9, 2, 3.1, 3.9, 5, 7.8, 12, 15.7, 31.4, 62, 100])
def test_window_is_the_finest_that_reaches(top, octaves):
    bottom = max(top - int(octaves * 2**23), 1)
    span = top - bottom
    word = hooks.window_word(top, span, False)
    step, offset = (word & 255) << 14, word >> 16
    fits = [s << 14 for s in STEPS if span + span // 64 + span // 256 < 256 * (s << 14)]
    assert step == min(fits, default=2**21)
    if fits:
        assert span <= 251.1 * step
        assert bottom // step - offset >= (1 if offset else 0)
    assert top // step + 1 - offset <= 255  # rounding up at the top


@tops
@pytest.mark.parametrize("step", STEPS)
def test_every_code_of_a_second_moment_is_stored_again(top, step):
    """For any random bits: what has not changed has no error."""
    size, offset = window_of(top, step)
    codes = np.arange(1, 256)
    bits = (codes + offset) * size
    codes, bits = codes[bits <= 0x7F7FFFFF], bits[bits <= 0x7F7FFFFF]
    for random in 0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF:
        np.testing.assert_array_equal(encode_nus(bits, top, step, random), codes)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("top", [0x3F800000, 0x3FFFFFFF], ids=hex)
def test_second_moments_are_rounded_without_bias(top, step):
    """Over all values of the random bits that count, the mean is the value, up to two of them."""
    num_bits = 13 + int(np.log2(step))  # of the random ones; a step has one or two more
    size, offset = window_of(top, step)
    rng = np.random.default_rng(step)
    lowest = (1 + offset) * size
    values = [lowest, lowest + 1, top, top - 1, *rng.integers(lowest, top, 4)]
    # Both sides of an octave's end, where the distance of neighbours changes.
    values += [x for e in (0x3F800000, 0x3F000000) for x in (e - 1, e, e + 1) if lowest <= x <= top]
    random = (np.arange(2**num_bits, dtype=np.uint64) << np.uint64(32 - num_bits)).astype(u32)
    for bits in values:
        codes = encode_nus(np.full(random.size, bits), top, step, random).astype(np.int64)
        mean = fractions.Fraction(int(((codes + offset) * size).sum()), random.size)
        assert abs(mean - int(bits)) <= fractions.Fraction(2 * size, random.size)
        assert np.unique(codes).size <= 2


def test_only_zero_is_stored_as_zero():
    bits = [0, 1, 0x00800000, 0x30000000, 0x3EFFFFFF, 0x3F800000]
    for random in 0, 0xFFFFFFFF:
        codes = encode_nus(bits, 0x3F800000, 4, random, has_zeros=True)
        assert codes[0] == 0
        assert (codes[1:] >= 1).all()


def test_code_0_is_a_second_moment_of_0():
    """Also where the window starts far above it; blocks without zeros do not use it."""
    rng = np.random.default_rng(0)
    nu = rng.uniform(1, 2, 2 * BLOCK).astype(f32)
    nu[3] = 0
    state = reference.quantize_ratio(nu, nu, rng.integers(0, 2**32, nu.size, u32))
    assert [word & HAS_ZEROS for word in state.nu_words.view(u32).tolist()] == [HAS_ZEROS, 0]
    np.testing.assert_array_equal(np.flatnonzero(state.nu_codes == 0), [3])
    mu, nu = reference.dequantize_ratio(state)
    assert nu[3] == mu[3] == 0
    assert (np.delete(nu, 3) >= 1).all()


@pytest.mark.parametrize("step", STEPS)
def test_largest_second_moments_stay_finite(step):
    """They are stored as 2^127, and that may be rounded up."""
    top = 0x7F000000
    size, offset = window_of(top, step)
    for random in 0, 0xFFFFFFFF:
        codes = encode_nus([top, top - 1], top, step, random).astype(np.int64)
        assert np.isfinite(floats((codes + offset) * size)).all()


def test_every_code_of_a_first_moment():
    """Code k stands for k |k| / 127^2 of the scale, and its value is stored as k again."""
    k = np.arange(-127, 128)
    codes = k.astype(np.int8).view(np.uint8)
    for scale in f32(1), f32(0.3), f32(7.1e-5), f32(2.0**-64):
        state = reference.RatioState(
            np.pad(codes, (0, 1)),
            np.full(BLOCK, 253, np.uint8),  # 1, of which the unit is 1
            np.array([scale]),
            np.array([hooks.window_word(0x3F800000, 0, False)], u32).view(f32),
        )
        mu, nu = reference.dequantize_ratio(state)
        assert (nu == 1).all()
        np.testing.assert_allclose(mu[:255], k * np.abs(k) / 127.0**2 * scale, rtol=1e-6)
        random = np.full(255, 0x8000, u32)
        np.testing.assert_array_equal(hooks.encode_ratio_mu(mu[:255], scale, random), codes)


@pytest.mark.fast
def test_first_moments_are_rounded_without_bias():
    """Over all values of the random bits, the mean is the value, up to 2^-16 of a step."""
    random = np.arange(2**16, dtype=u32)
    rng = np.random.default_rng(0)
    for ratio in [0.0, 1e-9, 1.0, 0.5, *rng.uniform(0, 1, 20), *rng.uniform(0, 1e-3, 20)]:
        for value in f32(ratio), f32(-ratio):
            codes = hooks.encode_ratio_mu(np.full(random.size, value), 1.0, random).view(np.int8)
            k = codes.astype(np.int64)
            mean = fractions.Fraction(int((k * np.abs(k)).sum()), random.size)
            step = 2 * int(np.abs(k).max()) + 1
            exact = fractions.Fraction(float(value)) * fractions.Fraction(float(f32(16128.99)))
            assert abs(mean - exact) <= step * fractions.Fraction(1, 2**16) + abs(exact) / 2**23
            assert np.unique(codes).size <= 2


def test_every_decision_between_squares():
    """Against rationals: the other neighbour only where rounding errors of a float decide."""
    inverse = fractions.Fraction(float(f32(16128.99)))  # of scale 1
    rng = np.random.default_rng(0)
    for k in range(127):
        for word in [0, 1, 0x8000, 0xFFFF, *rng.integers(0, 2**16, 4)]:
            f = fractions.Fraction(int(word), 2**16)
            border = (k * k + f * (2 * k + 1)) / inverse
            step = (2 * k + 1) / inverse * fractions.Fraction(1, 10_000)
            below, above = (f32(max(float(border + sign * step), 0)) for sign in (-1, 1))
            codes = hooks.encode_ratio_mu(np.array([below, above], f32), 1.0, np.full(2, word, u32))
            if above <= 1:
                assert codes[1] == k + 1
            if word > 6:  # else `below` may be beyond the decision of the square before
                assert codes[0] == k


def test_units_are_near_the_root():
    bits = np.concatenate([np.arange(0x00800000, LARGEST, 0x3FFF1), np.arange(0, 40, 1) << 22])
    nu = floats(bits[bits >= 0x00800000])
    unit, reciprocal = ratio_unit(nu)
    ratio = np.sqrt(nu.astype(np.float64)) / unit
    assert (ratio >= 0.94).all() and (ratio < 1.5).all()
    np.testing.assert_allclose(unit.astype(np.float64) * reciprocal, 1, rtol=2e-7)


@dataclasses.dataclass(frozen=True)
class Stream:
    """Gradients of one leaf over several steps."""

    size: int = 700
    exponent: float = 0.0  # of ten: the size of the gradients
    spread: float = 2.0  # elements differ by e to the power of this, typically
    count: int = 0  # steps already taken
    hyperparams: tuple[float, float, float, float] = (0.9, 0.999, 1e-8, 0.0)
    key: int = 0x123456789ABCDEF
    nesterov: bool = False

    def grads(self, num_steps):
        rng = np.random.default_rng(0)
        scale = 10.0**self.exponent * np.exp(rng.normal(0, self.spread, self.size))
        for step in range(num_steps):
            grad = (rng.normal(size=self.size) * scale).astype(f32)
            grad[rng.random(self.size) < 0.1] = 0
            if step > 10:
                grad[::5] = 0  # for ever: idle elements
            if step == 15:
                grad[:] = 0
            if step == 20:
                grad[3:4], grad[300:301] = np.nan, np.inf
            yield grad


STREAMS = {
    "plain": Stream(),
    "uniform": Stream(spread=0.1),
    "wide": Stream(spread=10),
    "wider than the window": Stream(spread=25),
    "one block": Stream(size=256),
    "one element": Stream(size=1),
    "tiny": Stream(exponent=-9),
    "subnormal second moments": Stream(exponent=-21),
    "vanishing second moments": Stream(exponent=-30),
    "huge": Stream(exponent=19, spread=1),
    "slow decay": Stream(hyperparams=(0.99, 0.9999, 1e-8, 0.0)),
    "fast decay": Stream(hyperparams=(0.95, 0.9, 1e-8, 0.0)),
    "no memory": Stream(hyperparams=(0.0, 0.0, 1e-8, 0.0)),
    "ratios that overflow": Stream(exponent=10, spread=20, hyperparams=(0.99, 0.0, 1e-8, 0.0)),
    "late": Stream(count=2**31 - 60),
    "negative key": Stream(key=-1),
    "nesterov": Stream(nesterov=True),
}


def check_stored(arena, num_blocks, state, codec):
    """Codes and words of an arena, against those of the reference's `RatioState`."""
    for actual, expected in zip(split_arena(arena, num_blocks, codec), state, strict=True):
        np.testing.assert_array_equal(actual.view(np.uint8), expected.view(np.uint8))


every_codec = pytest.mark.parametrize("codec", ["ratio", "ratio6", "ratio4"])


@every_codec
@pytest.mark.parametrize("stream", STREAMS.values(), ids=STREAMS)
def test_step_is_that_of_the_reference(stream, codec):
    """Updates, codes and words, bit for bit."""
    num_blocks = -(-stream.size // BLOCK)
    arena = np.full(arena_bytes(num_blocks, 0, codec=codec), 0xCC, np.uint8)
    state = reference.init_leaf(stream.size, True, codec)
    hyperparams = reference.Hyperparams(*stream.hyperparams)
    for step, grad in enumerate(stream.grads(50)):
        count = stream.count + step
        expected, state = reference.step_leaf(
            grad, state, count, hyperparams, stream.nesterov, leaf_key=stream.key
        )
        update = grad.copy()
        options = {"nesterov": stream.nesterov, "fresh": step == 0, "leaf_key": stream.key}
        blocks = [(0, num_blocks)]
        step_blocks(update, arena, codec, blocks, stream.hyperparams, count, **options)
        np.testing.assert_array_equal(update, expected)
        check_stored(arena, num_blocks, state, codec)


SPECIAL = floats(
    [0, 0x80000000, 1, 0x007FFFFF, 0x00800000, 0x80800000, 0x1F800000, 0x3F800000, 0xBF800000]
    + [0x5F000000, 0x5F7FFFFF, 0x5F800000, 0xDF800000, 0x7F7FFFFF, 0xFF7FFFFF]
    + [0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC00001]
)


@pytest.mark.fast
@every_codec
@pytest.mark.parametrize("seed", range(40))
def test_any_gradients_and_hyperparameters(seed, codec):
    """Bits of the reference, block by block; what is stored is finite and not negative."""
    rng = np.random.default_rng(seed)
    size = int(rng.choice([1, 255, 256, 257, 600]))
    num_blocks = -(-size // BLOCK)
    hyperparams = (
        float(rng.choice([0, 1e-45, 0.5, 0.9, 0.99, 1 - 2**-24, np.nan, -0.1])),
        float(rng.choice([0, 1e-3, 0.9, 0.999, 0.999, 1 - 2**-24, 1.0, np.nan])),
        float(rng.choice([0, 1e-45, 1e-8, 1e-8, 1.0, 3e38, np.inf, -1e-8])),
        float(rng.choice([0, 0, 0, 1e-45, 2.0**-101, 1e-8, 1e38, np.nan])),
    )
    nesterov, key = bool(rng.integers(2)), int(rng.integers(-(2**63), 2**63))
    scale = np.exp(rng.normal(0, 1, size) * rng.choice([0, 2, 30])) * 10 ** rng.uniform(-20, 20)
    arena = np.full(arena_bytes(num_blocks, 0, codec=codec), 0xCC, np.uint8)
    state = reference.init_leaf(size, True, codec)
    for step in range(20):
        with np.errstate(over="ignore"):
            grad = (rng.normal(size=size) * scale).astype(f32)
        kind = rng.integers(4)
        if kind == 0:
            grad = rng.choice(SPECIAL, size)
        elif kind == 1:
            grad = rng.integers(0, 2**32, size, u32).view(f32)
        elif kind == 2:
            grad[rng.random(size) < rng.random()] = rng.choice(SPECIAL)
        with np.errstate(all="ignore"):
            expected, state = reference.step_leaf(
                grad, state, step, reference.Hyperparams(*hyperparams), nesterov, leaf_key=key
            )
        update = grad.copy()
        options = {"nesterov": nesterov, "fresh": step == 0, "leaf_key": key}
        blocks = [(block, block + 1) for block in rng.permutation(num_blocks).tolist()]
        step_blocks(update, arena, codec, blocks, hyperparams, step, **options)
        is_nan = np.isnan(expected)
        np.testing.assert_array_equal(np.isnan(update), is_nan)
        np.testing.assert_array_equal(update.view(u32)[~is_nan], expected.view(u32)[~is_nan])
        check_stored(arena, num_blocks, state, codec)
        mu, nu = reference.dequantize_ratio(state)
        assert np.isfinite(mu).all() and np.isfinite(nu).all() and (nu >= 0).all()


def rms(x):
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


def carry(grads, b1=0.9, nesterov=False, b2=0.999):
    """Updates of the code and of float32 moments on the same gradients, (steps, size) each."""
    state = reference.init_leaf(grads[0].size, True, "ratio")
    exact = reference.init_leaf(grads[0].size, False)
    ours, theirs = [], []
    hyperparams = reference.Hyperparams(b1, b2)
    for count, grad in enumerate(grads):
        update, state = reference.step_leaf(grad, state, count, hyperparams, nesterov)
        ours.append(update)
        update, exact = reference.step_leaf(grad, exact, count, hyperparams, nesterov)
        theirs.append(update)
    return np.array(ours), np.array(theirs)


def test_small_gradients_beside_large_ones_take_the_steps_of_float32():
    """Bars: never above 1.5 times float32 (no blow-up), never below a third (no freeze)."""
    scales = np.array([1, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-6])[np.arange(BLOCK) % 8]
    rng = np.random.default_rng(0)
    grads = [(rng.normal(size=BLOCK) * scales).astype(f32) for _ in range(1000)]
    ours, exact = carry(grads)
    for i in range(8):
        ratio = rms(ours[-200:, i::8]) / rms(exact[-200:, i::8])
        assert 1 / 3 < ratio < 1.5
        assert 0.8 < ratio < 1.25  # what it does


def test_second_moments_decay():
    """Gradients of a few elements shrink ten times: their steps follow float32's within 1.2."""
    rng = np.random.default_rng(0)
    few = np.arange(BLOCK) % 16 == 15
    grads = rng.normal(size=(5000, BLOCK)).astype(f32)
    grads[500:, few] *= f32(0.1)
    ours, exact = carry(grads)
    assert 1 / 1.2 < rms(ours[-500:, few]) / rms(exact[-500:, few]) < 1.2


@pytest.mark.parametrize("nesterov", [False, True], ids=["plain", "nesterov"])
@pytest.mark.parametrize("b1", [0.0, 0.9, 0.95, 0.99])
def test_updates_follow_float32(b1, nesterov):
    """Elements of several sizes in a block, some of which seldom have gradients."""
    rng = np.random.default_rng(1)
    scales = np.exp(rng.normal(0, 1, BLOCK))
    grads = (rng.normal(size=(1500, BLOCK)) * scales).astype(f32)
    grads[:, ::4] *= rng.random((1500, BLOCK // 4)) < 0.02
    ours, exact = (x[-300:].astype(np.float64) for x in carry(grads, b1, nesterov))
    for part in slice(0, None, 4), slice(1, None, 4):
        error = np.sum((ours - exact)[:, part] ** 2) / np.sum(exact[:, part] ** 2)
        assert error < 0.02


def test_neighbours_of_a_spike_go_on():
    """One gradient 1e11 times as large as the others' takes three quarters of a block's window."""
    rng = np.random.default_rng(4)
    grads = rng.normal(size=(800, BLOCK)).astype(f32)
    grads[300, 7] = 1e11
    ours, exact = (np.delete(x, 7, axis=1) for x in carry(grads))
    for start in range(300, 800, 50):
        ratio = rms(ours[start : start + 50]) / rms(exact[start : start + 50])
        assert 1 / 3 < ratio < 1.5


def carried_error(b1, b2, elements):
    """Relative RMS error of `elements`; the first of a block has gradients in 10 steps only."""
    rng = np.random.default_rng(5)
    grads = rng.normal(size=(2500, 2 * BLOCK)).astype(f32)
    grads[:10, ::BLOCK], grads[10:, ::BLOCK] = 1, 0
    ours, exact = carry(grads, b1, b2=b2)
    return rms((ours - exact)[:, elements]) / rms(exact[:, elements])


@pytest.mark.parametrize(
    "b1, b2", [(0.9, 0.95), (0.95, 0.98), (0.97, 0.9), (0.99, 0.97), (0.99, 0.95)]
)
def test_neighbours_of_an_idle_element_go_on(b1, b2):
    """Also with b1^2 > b2, where its ratio would grow without end."""
    others = np.arange(2 * BLOCK) % BLOCK != 0
    assert carried_error(b1, b2, others) < 1.5 * carried_error(0.9, 0.999, others)


def test_an_element_that_stands_still_comes_back():
    """With b1^2 > b2 a first moment is dropped, and gradients make a new one."""
    rng = np.random.default_rng(6)
    grads = rng.normal(size=(1200, BLOCK)).astype(f32)
    grads[:, 0] = 1
    grads[200:700, 0] = 0
    ours, exact = carry(grads, 0.99, b2=0.95)
    assert np.abs(ours[:, 0]).max() < 1.6  # float32's goes up to thousands
    assert ours[699, 0] == 0
    np.testing.assert_allclose(ours[-1, 0], exact[-1, 0], rtol=0.05)


@pytest.mark.parametrize("period", [55, 89])
def test_gradients_in_rhythm_with_the_random_bits(period):
    """A data set in a fixed order, and the golden ratio's sequence almost repeats after as many."""
    rng = np.random.default_rng(3)
    batches = (rng.normal(size=(period, BLOCK)) * np.exp(rng.normal(0, 0.7, BLOCK))).astype(f32)
    ours, exact = carry([batches[step % period] for step in range(4000)])
    ours, exact = (x[-10 * period :].astype(np.float64) for x in (ours, exact))
    assert np.sum((ours - exact) ** 2) / np.sum(exact**2) < 0.01
    ratio = np.sqrt(np.sum(ours**2, 0) / np.sum(exact**2, 0))  # of each element
    assert 0.8 < ratio.min() and ratio.max() < 1.25


@pytest.mark.parametrize("b1, steps", [(0.0, 10), (0.9, 300), (0.95, 600), (0.99, 3000)])
@pytest.mark.parametrize("nesterov", [False, True], ids=["plain", "nesterov"])
def test_zero_gradients_end_in_zero_updates(b1, steps, nesterov):
    """First moments do not freeze at a last code: they become 0, and the element stands still."""
    rng = np.random.default_rng(0)
    grads = rng.normal(size=(100 + steps, BLOCK)).astype(f32)
    grads[100:, ::2] = 0
    ours, _ = carry(grads, b1, nesterov)
    assert not ours[-1, ::2].any()
    assert ours[-1, 1::2].all()
