"""The compiled step against the NumPy reference: the same bits, whatever goes in.

Updates are compared bit for bit (any NaN equals any NaN), stored codes and scales as bytes.
Gradients are made by NumPy and passed in as arrays: XLA flushes subnormal numbers that it computes.
Tests with `device` run on the CPU and on a GPU; those of `step_blocks` call the CPU loop alone.
"""

import ctypes
import dataclasses
import functools
import itertools
import math
import mmap
import os

import hypothesis
import hypothesis.strategies as st
import jax
import ml_dtypes
import numpy as np
import pytest

from helpers import (
    ALL_QUANTIZED,
    BLOCK,
    DTYPES,
    FLOAT32_MOMENTS,
    FORMATS,
    QUANTIZED,
    arena_bytes,
    f32,
    layout_bytes,
    leaf_keys,
    make_arena,
    reference,
    same_bits,
    step_blocks,
    stored_leaves,
)
from optimizers import assert_stored
from paged_optax import Quantization, release, scale_by_paged_adam8bit

HALVES = ["bfloat16", "float16"]
BELOW_ONE = float(np.nextafter(f32(1), f32(0)))
DEFAULTS = reference.Hyperparams()
every_codec = pytest.mark.parametrize("codec", QUANTIZED)


@dataclasses.dataclass(frozen=True)
class LeafSpec:
    """A leaf and what its gradients are like."""

    shape: tuple[int, ...]
    dtype: str = "float32"
    exponent: int = 0  # of ten: the size of the gradients
    spread: float = 2.0  # elements differ by e to the power of this, typically
    zeros: float = 0.0  # share of elements that are 0
    bad: float = 0.0  # share of elements that are NaN or infinite

    @property
    def size(self):
        return math.prod(self.shape)


def make_gradients(specs, num_steps, seed):
    """`num_steps` lists of arrays. An element keeps its scale over the steps."""
    rng = np.random.default_rng(seed)
    scales = [
        10.0**spec.exponent * np.exp(rng.normal(0, spec.spread, spec.shape)) for spec in specs
    ]
    for _ in range(num_steps):
        grads = []
        for spec, scale in zip(specs, scales, strict=True):
            with np.errstate(over="ignore", under="ignore"):
                grad = np.array(scale * rng.standard_normal(spec.shape)).astype(DTYPES[spec.dtype])
            grad[rng.random(spec.shape) < spec.zeros] = 0
            bad = rng.random(spec.shape) < spec.bad
            grad[bad] = rng.choice([np.nan, np.inf, -np.inf], bad.sum())
            grads.append(grad)
        yield grads


@pytest.fixture
def check_run(device):
    """Function that runs a compiled transformation beside the reference and compares every step.

    Args: gradients of each step, hyperparameters, whether these are traced, nesterov, quantization,
    the count to start from. Moments are compared after the first, second and last step.
    """

    def check(
        steps,
        hyperparams=DEFAULTS,
        traced=False,
        nesterov=False,
        quantization=None,
        start=0,
    ):
        quantization = quantization or Quantization()
        transform = functools.partial(
            scale_by_paged_adam8bit, nesterov=nesterov, quantization=quantization
        )

        @jax.jit
        def update(grads, state, traced_hyperparams):
            return transform(*(traced_hyperparams if traced else hyperparams)).update(grads, state)

        steps = list(steps)
        sizes = [grad.size for grad in steps[0]]
        keys = leaf_keys(tuple(f"[{i}]" for i in range(len(sizes))), quantization.seed)
        expected = [
            reference.init_leaf(n, n >= quantization.min_size, quantization.codec) for n in sizes
        ]
        state = transform().init(steps[0])._replace(count=np.int32(start))
        state = jax.device_put(state, device)  # else the second step compiles again
        operands = tuple(np.array(hyperparams, f32)) if traced else ()
        for i, grads in enumerate(steps):
            on_device = [jax.device_put(grad, device) for grad in grads]
            updates, state = update(on_device, state, operands)
            for leaf, (grad, actual) in enumerate(zip(grads, updates, strict=True)):
                what = f"step {i + 1}, leaf {leaf}"
                wanted, expected[leaf] = reference.step_leaf(
                    grad, expected[leaf], start + i, hyperparams, nesterov, leaf_key=keys[leaf]
                )
                same_bits(actual, wanted, what)
                same_bits(on_device[leaf], grad, f"{what}: the gradient was overwritten")
            if i in (0, 1, len(steps) - 1):
                for leaf, stored in enumerate(stored_leaves(state)):
                    assert_stored(stored, expected[leaf], f"after {what}")
        release(state)
        return expected

    return check


def requantize(moment, signed):
    return reference.quantize(reference.dequantize(moment, signed), signed)


def is_subnormal(x):
    return (x != 0) & (np.abs(x) < 2.0**-126)


# ------------------------------------------------------------------------------------- any tree

SHAPES = [(), (0,), (3, 0, 2), (1,), (255,), (256,), (257,), (16, 20), (7, 3, 5), (1000,)]
LARGE_SHAPES = [(4095,), (4096,), (64, 64), (4097,), (65, 77), (5, 1000), (9999,)]

leaf_specs = st.builds(
    LeafSpec,
    shape=st.sampled_from(SHAPES) | st.sampled_from(LARGE_SHAPES),
    dtype=st.sampled_from(list(DTYPES)),
    exponent=st.integers(-20, 20),
    spread=st.sampled_from([0.0, 2.0, 6.0]),
    zeros=st.sampled_from([0.0, 0.5, 0.999]),
    bad=st.sampled_from([0.0, 0.0, 0.002, 0.3]),
)
any_hyperparams = st.builds(
    reference.Hyperparams,
    b1=st.sampled_from([0.9, 0.0, 0.5, 0.99, BELOW_ONE]),
    b2=st.sampled_from([0.999, 0.0, 0.5, 0.95, BELOW_ONE]),
    eps=st.sampled_from([1e-8, 0.0, 1e-30, 1e-3]),
    eps_root=st.sampled_from([0.0, 1e-16, 1e-3]),
)


@every_codec
@hypothesis.given(
    specs=st.lists(leaf_specs, min_size=1, max_size=5),
    hyperparams=any_hyperparams,
    traced=st.booleans(),
    nesterov=st.booleans(),
    min_size=st.sampled_from([0, 4096]),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_tree(check_run, codec, specs, hyperparams, traced, nesterov, min_size, seed):
    check_run(
        make_gradients(specs, 12, seed),
        hyperparams,
        traced,
        nesterov,
        Quantization(codec, min_size, seed=seed),
    )


@pytest.mark.parametrize(
    "quantization",
    [None, ALL_QUANTIZED, FLOAT32_MOMENTS, Quantization("dynamic"), Quantization("dynamic", 0)],
    ids=["default", "all", "none", "dynamic", "all dynamic"],
)
def test_every_shape_and_dtype_in_one_tree(check_run, quantization):
    specs = [
        LeafSpec(shape, dtype, exponent=(i % 3) * 4 - 4, zeros=0.1, bad=0.001)
        for i, (shape, dtype) in enumerate(itertools.product(SHAPES + LARGE_SHAPES, DTYPES))
    ]
    check_run(make_gradients(specs, 8, seed=1), quantization=quantization)


def test_many_leaves(check_run):
    """More leaves than one launch of the CUDA kernel takes, empty ones at every border."""
    shapes = [(0,), (0,)] + [(i % 7 * 50,) if i % 5 else (4096 + i,) for i in range(300)] + [(0,)]
    specs = [LeafSpec(s, list(DTYPES)[i % 3], zeros=0.2) for i, s in enumerate(shapes)]
    check_run(make_gradients(specs, 2, seed=2))


def test_only_empty_leaves(check_run):
    check_run(make_gradients([LeafSpec((0,)), LeafSpec((2, 0), "float16")], 2, seed=0))


@pytest.mark.parametrize(
    "dtype, quantization",
    [
        ("float32", None),
        ("bfloat16", None),
        ("float16", Quantization("dynamic")),
        ("bfloat16", FLOAT32_MOMENTS),
    ],
    ids=["ratio", "ratio, bfloat16", "dynamic", "float32"],
)
def test_large_leaf(check_run, dtype, quantization):
    """Beyond a chunk of the arena, and enough for all threads; the reference has one."""
    specs = [LeafSpec((300,)), LeafSpec((1100, 1009), dtype), LeafSpec((5, 1000), zeros=0.5)]
    check_run(make_gradients(specs, 2, seed=3), quantization=quantization)


@every_codec
@pytest.mark.parametrize(
    "dtype, exponent, moment",
    [
        ("float32", -43, "mu"),
        ("float32", -39, "mu"),
        ("float32", -20, "nu"),
        ("bfloat16", -39, "mu"),
        ("bfloat16", -20, "nu"),
    ],
)
def test_subnormal_numbers(check_run, codec, dtype, exponent, moment):
    """Subnormal gradients, moments and scales count, although XLA's threads flush them to zero."""
    specs = [LeafSpec((size,), dtype, exponent, spread=1.0) for size in (999, 4500)]
    for hyperparams in (DEFAULTS, reference.Hyperparams(0.5, 0.5, 1e-38, 0.0)):
        grads = make_gradients(specs, 5, seed=4)
        small, large = check_run(grads, hyperparams, quantization=Quantization(codec))
        assert is_subnormal(getattr(small, moment)).any()
        if codec == "dynamic":
            assert is_subnormal(getattr(large, moment).scales).any() or exponent == -39
        elif moment == "nu":
            assert is_subnormal(reference.dequantize_ratio(large)[1]).any()


@every_codec
@pytest.mark.parametrize("nesterov", [False, True], ids=["plain", "nesterov"])
@pytest.mark.parametrize("start", [1, 10**6, 2**24, 2**31 - 3])
def test_large_counts(check_run, start, nesterov, codec):
    """A state restored to any count; at 2^31 - 1 optax's counter stays where it is."""
    specs = [LeafSpec((300,)), LeafSpec((5000,), "bfloat16")]
    hyperparams = reference.Hyperparams(BELOW_ONE, BELOW_ONE, 1e-12, 0.0)
    grads = make_gradients(specs, 3, seed=5)
    check_run(grads, hyperparams, False, nesterov, Quantization(codec), start)


@every_codec
@pytest.mark.parametrize("value", [np.nan, np.inf, -0.5, 1.0, 1.5], ids=str)
@pytest.mark.parametrize("name", ["b1", "b2"])
def test_decay_out_of_range_keeps_moments(device, name, value, codec):
    """A schedule gone wrong: all updates are NaN, moments stay, the next good step goes on.

    Quantized ones stay up to requantization. In the dynamic code that moves blocks that hold no
    code 255; in the ratio code first moments, which are rounded at random.
    """
    transform = functools.partial(scale_by_paged_adam8bit, quantization=Quantization(codec))

    @jax.jit
    def update(grads, state, decay):
        return transform(**{name: decay}).update(grads, state)

    specs = [LeafSpec((100,)), LeafSpec((5000,))]
    good = getattr(DEFAULTS, name)
    stored = []
    steps = list(make_gradients(specs, 3, seed=6))
    state = transform().init(steps[0])
    for grads, decay in zip(steps, (good, value, good), strict=True):
        on_device = [jax.device_put(grad, device) for grad in grads]
        updates, state = update(on_device, state, f32(decay))
        stored.append(stored_leaves(state))
        assert all(np.isnan(u).all() == (decay is value) for u in map(np.asarray, updates))
    (mu, nu), (mu_codes, nu_codes, mu_scales, nu_scales) = stored[0]
    if codec == "ratio":
        old = reference.dequantize_ratio(reference.RatioState(*stored[0][1]))
        random = reference.ratio_random(leaf_keys(("[0]", "[1]"), 0)[1], 1, 5000)
        kept = reference.quantize_ratio(*(moment[:5000] for moment in old), random)
        same_bits(reference.dequantize_ratio(kept)[1], old[1])
    else:
        kept = reference.LeafState(
            requantize(reference.Quantized(mu_codes, mu_scales), signed=True),
            requantize(reference.Quantized(nu_codes, nu_scales), signed=False),
        )
    assert_stored(stored[1][0], reference.LeafState(mu[:100], nu[:100]))
    assert_stored(stored[1][1], kept)
    for after in stored[2]:
        assert all(np.isfinite(x).all() for x in after)
    release(state)


@pytest.mark.parametrize("dtype", HALVES)
def test_every_half_as_gradient(check_run, dtype):
    """All 65,536 bit patterns, in float32 moments, with updates of about 1, g and 1/2."""
    patterns = np.arange(1 << 16, dtype=np.uint16)
    shuffled = np.random.default_rng(6).permuted([patterns] * 3, axis=1)
    steps = [[bits.view(DTYPES[dtype])] for bits in (patterns, *shuffled)]
    for hyperparams in (
        DEFAULTS,
        reference.Hyperparams(0.0, BELOW_ONE, 1.0, 0.0),
        reference.Hyperparams(0.5, 0.0, 1e-30, 0.0),
    ):
        check_run(steps, hyperparams, quantization=FLOAT32_MOMENTS)
    # Every number became the first moment, every NaN and infinity left it alone.
    first = check_run(steps[:1], reference.Hyperparams(b1=0.0), quantization=FLOAT32_MOMENTS)
    grad = steps[0][0].astype(f32)
    kept = ~(np.abs(grad) < 2.0**64)
    np.testing.assert_array_equal(first[0].mu[~kept], grad[~kept])


# ---------------------------------------------------------------------------- the CPU loop alone


def random_moments(rng, num_blocks):
    """Any codes under scales of all sizes: zero, subnormal, normal, the largest float."""

    def quantized():
        scales = np.exp2(rng.uniform(-149, 128, num_blocks)).astype(f32)
        special = scales[::5]
        special[:] = np.resize(f32([0, 2**-126, np.finfo(f32).max, 2**-149]), special.size)
        scales = np.minimum(scales, np.finfo(f32).max)
        return reference.Quantized(rng.integers(0, 256, num_blocks * BLOCK, np.uint8), scales)

    return reference.LeafState(quantized(), quantized())


def zero_padding(state, size):
    for moment, zero in zip(state, (127, 0), strict=True):
        moment.codes[size:] = zero
    return state


@pytest.mark.parametrize(
    "num_blocks, dtype",
    [
        *((num_blocks, "float32") for num_blocks in (1, 3, 4032, 4033, 9000)),
        *((num_blocks, half) for num_blocks in (3, 4033) for half in HALVES),
    ],
)
def test_step_from_any_moments(dtype, num_blocks):
    """Where the bytes lie, and that blocks of any scale are read, advanced and written right."""
    rng = np.random.default_rng(num_blocks)
    size = num_blocks * BLOCK - 56
    before = zero_padding(random_moments(rng, num_blocks), size)
    with np.errstate(over="ignore"):
        scale = np.repeat(before.mu.scales, BLOCK)[:size]
        grad = (scale * rng.standard_normal(size).astype(f32)).astype(DTYPES[dtype])
    arena = make_arena(*before)
    assert arena.size == arena_bytes(num_blocks, 0)
    update = step_blocks(grad.copy(), arena, "dynamic", [(0, num_blocks)], DEFAULTS, 7)
    with np.errstate(over="ignore"):
        expected, after = reference.step_leaf(grad, before, 7, DEFAULTS)
    same_bits(update, expected)
    np.testing.assert_array_equal(arena, make_arena(*after))


@pytest.mark.parametrize("num_blocks", [1, 3, 1024, 1025, 2500])
def test_step_from_any_float32_moments(num_blocks):
    rng = np.random.default_rng(num_blocks)
    size = num_blocks * BLOCK
    mu, nu, grad = np.exp2(rng.uniform(-149, 60, (3, size))).astype(f32)
    mu, grad = mu * rng.choice(f32([-1, 1]), size), grad * rng.choice(f32([-1, 1]), size)
    arena = make_arena(mu, nu)
    assert arena.size == arena_bytes(0, num_blocks)
    update = step_blocks(grad.copy(), arena, "float32", [(0, num_blocks)], DEFAULTS, 7)
    expected, after = reference.step_leaf(grad, reference.LeafState(mu, nu), 7, DEFAULTS)
    same_bits(update, expected)
    np.testing.assert_array_equal(arena, make_arena(*after))


@pytest.mark.fast
@pytest.mark.parametrize("format", FORMATS)
def test_order_of_blocks_does_not_matter(format):
    """One call, one call a block, backwards: what threads do in any number is one of these."""
    num_blocks = 50
    (grad,) = next(make_gradients([LeafSpec((num_blocks * BLOCK - 9,), "bfloat16")], 1, seed=7))
    blocks = [(i, i + 1) for i in range(num_blocks)]
    results = []
    for ranges in ([(0, num_blocks)], blocks, blocks[::-1], [(17, 50), (0, 0), (0, 17)]):
        arena = np.zeros(arena_bytes(num_blocks, num_blocks), np.uint8)
        for count in range(2):
            update = step_blocks(
                grad.copy(), arena, format, ranges, DEFAULTS, count, fresh=count == 0
            )
        results.append((update.tobytes(), arena.tobytes()))
    assert len(set(results)) == 1


@pytest.mark.parametrize("format", FORMATS)
def test_fresh_moments_are_not_read(format):
    (grad,) = next(make_gradients([LeafSpec((1000,))], 1, seed=8))
    results = []
    for fill in (0, 255):
        few = {"ratio6": 392, "ratio4": 264}
        nbytes = {"float32": 2048, "bfloat16": 1024, **few}.get(format, 520)  # of a block
        arena = np.full(4 * nbytes + 512, fill, np.uint8)
        update = step_blocks(grad.copy(), arena, format, [(0, 4)], DEFAULTS, 0, fresh=True)
        assert np.all(arena[-512:] == fill)
        results.append((update.tobytes(), arena[:-512].tobytes()))
    assert results[0] == results[1]


@pytest.mark.parametrize("dtype", HALVES)
def test_every_rounding_to_half(dtype):
    """Updates at every half, at every decision point between two, and one float beside each.

    An update is made exactly: with a gradient of 0, nu = 0 and b1 = 1/2 it is mu / 2 / eps.
    """
    halves = np.arange(1 << 16, dtype=np.uint16).view(DTYPES[dtype]).astype(f32)
    halves = np.unique(halves[np.isfinite(halves)])
    with np.errstate(over="ignore"):
        middles = (halves[1:] / 2 + halves[:-1] / 2).astype(f32)
    # Beyond the largest half lies the decision between it and infinity.
    overflow = halves[-1] + (halves[-1] - halves[-2]) / 2
    points = np.concatenate([halves, middles, [overflow, -overflow, 3e38, -3e38]]).astype(f32)
    points = [np.nextafter(points, f32(-np.inf)), points, np.nextafter(points, f32(np.inf))]
    points = np.concatenate(points) + f32(0)  # no -0.0, which no step makes
    points = points[np.isfinite(points)]
    small = np.abs(points) < 1
    for targets, factor, eps in ((points[small], 2, 1.0), (points[~small], 1, 0.5)):
        size = -(-targets.size // BLOCK) * BLOCK
        mu = np.pad(targets * f32(factor), (0, size - targets.size))
        grad = np.zeros(size, DTYPES[dtype])
        arena = make_arena(mu, np.zeros(size, f32))
        blocks = [(0, size // BLOCK)]
        update = step_blocks(grad.copy(), arena, "float32", blocks, (0.5, 0.5, eps, 0.0), 1000)
        with np.errstate(over="ignore"):
            expected = targets.astype(DTYPES[dtype])
        np.testing.assert_array_equal(
            update[: targets.size].view(np.uint16), expected.view(np.uint16)
        )


# ------------------------------------------------------------------------- non-finite gradients

BAD = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf, "square overflows": 1e30}


@pytest.mark.fast
@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bad_gradient_in_float32_moments(device, dtype, bad):
    """NaN in this element's update; its moments stay; no other element notices."""
    size, where = 700, [0, 5, 300, 699]
    tx = scale_by_paged_adam8bit()
    update = jax.jit(tx.update)
    first, second, third = make_gradients([LeafSpec((size,), dtype)], 3, seed=9)
    others = np.setdiff1d(np.arange(size), where)
    runs = {}
    for spoilt in (False, True):
        state = tx.init(first)
        _, state = update([jax.device_put(first[0], device)], state)
        before = stored_leaves(state)[0]
        grad = second[0].copy()
        if spoilt:
            grad[where] = bad
        updates, state = update([jax.device_put(grad, device)], state)
        after = stored_leaves(state)[0]
        last, state = update([jax.device_put(third[0], device)], state)
        runs[spoilt] = [np.asarray(updates[0]), *after, np.asarray(last[0])]
        if spoilt:
            assert np.isnan(runs[True][0][where]).all()
            for old, new in zip(before, after, strict=True):
                same_bits(new[where], old[where])
            assert np.isfinite(runs[True][-1]).all()  # and the next step is a normal one
        release(state)
    for clean, spoilt in zip(runs[False], runs[True], strict=True):
        same_bits(spoilt[others], clean[others])


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
@pytest.mark.parametrize("largest", [False, True], ids=["small element", "largest element"])
def test_bad_gradient_in_quantized_moments(device, largest, bad):
    """The element's moments stay up to requantization; neighbours in the block do not notice.

    Where the element does not set the block's scale, the rest is as if its gradient had been 0.
    Where it does, its moments still set the scale: as they were, not decayed.
    """
    size, where = 4096, 1000
    block = slice(where // BLOCK * BLOCK, where // BLOCK * BLOCK + BLOCK)
    rng = np.random.default_rng(10)
    first = rng.uniform(0.5, 1.0, size).astype(f32)
    first[where] = 2.0 if largest else 0.25
    second = rng.uniform(0.5, 1.0, size).astype(f32)
    tx = scale_by_paged_adam8bit(quantization=Quantization("dynamic"))
    update = jax.jit(tx.update)
    runs = []
    for gradient in (0.0, bad):
        state = tx.init(first)
        _, state = update(jax.device_put(first, device), state)
        before = stored_leaves(state)[0]
        second[where] = gradient
        updates, state = update(jax.device_put(second, device), state)
        runs.append((np.asarray(updates), *stored_leaves(state)[0]))
        release(state)
    clean, spoilt = runs
    others = np.arange(size) != where
    assert np.isnan(spoilt[0][where])
    same_bits(spoilt[0][others], clean[0][others])

    old = [
        reference.dequantize(reference.Quantized(before[i], before[2 + i]), signed)
        for i, signed in enumerate((True, False))
    ]
    for i, signed in enumerate((True, False)):
        codes, scales = spoilt[1 + i], spoilt[3 + i]
        if largest:
            assert scales[where // BLOCK] == old[i][where]
            assert codes[where] == before[i][where] == 255
        else:
            same_bits(scales, clean[3 + i])
            np.testing.assert_array_equal(codes[others], clean[1 + i][others])
            as_block = np.resize(f32([old[i][where], scales[where // BLOCK]]), BLOCK)
            assert codes[where] == reference.quantize(as_block, signed).codes[0]
        outside = np.ones(size, bool)
        outside[block] = False
        np.testing.assert_array_equal(codes[outside], clean[1 + i][outside])


# ----------------------------------------------------------------------------- layout and sizes


@pytest.mark.fast
@pytest.mark.parametrize(
    "num_dynamic, num_float32",
    [
        (0, 0),
        (1, 0),
        (0, 1),
        (3, 5),
        (4031, 7),
        (4032, 1024),
        (4033, 1),
        (2**23 + 4, 10**6),
        (2**31 + 1, 0),
        (2**32 - 2**16 - 1, 2**32 - 2**16 - 1),
    ],
)
def test_arena_bytes(num_dynamic, num_float32):
    assert arena_bytes(num_dynamic, num_float32) == layout_bytes(num_dynamic, num_float32)


def test_bytes_per_parameter():
    for size in (10**7, 10**9, 7 * 10**10):
        assert 2.031 < arena_bytes(-(-size // BLOCK), 0) / size < 2.032
        assert 1.531 < arena_bytes(-(-size // BLOCK), 0, codec="ratio6") / size < 1.533
        assert 1.031 < arena_bytes(-(-size // BLOCK), 0, codec="ratio4") / size < 1.033


MAP_NORESERVE = 0x4000  # of Linux; Python names it from 3.13 on


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux")
def test_more_than_two_billion_elements():
    """Both ends of a bfloat16 leaf of 2^31 + 1000 elements, in memory that exists when touched.

    The kernel knows which pages were: a few of 2 million.
    """
    size = 2**31 + 1000
    num_blocks = -(-size // BLOCK)
    last_block, in_last = num_blocks - 1, size - (num_blocks - 1) * BLOCK
    nbytes = arena_bytes(num_blocks, 0)
    assert nbytes == layout_bytes(num_blocks, 0)
    values, arena = map_lazily(2 * size), map_lazily(nbytes)
    halves = np.frombuffer(values, ml_dtypes.bfloat16)
    stored = np.frombuffer(arena, np.uint8)

    ends = {0: slice(0, BLOCK), last_block: slice(size - in_last, size)}
    chunk = last_block // 4032 * 2**21
    in_chunk, row = num_blocks - last_block // 4032 * 4032, last_block % 4032
    places = {  # of the mu codes, nu codes, mu scale and nu scale of a block
        0: (0, 4032 * 256, 4032 * 512, 4032 * 512 + 4),
        last_block: (
            chunk + row * 256,
            chunk + in_chunk * 256 + row * 256,
            chunk + in_chunk * 512 + row * 8,
            chunk + in_chunk * 512 + row * 8 + 4,
        ),
    }
    rng = np.random.default_rng(11)
    expected = {block: reference.init_leaf(BLOCK, quantized=True) for block in ends}
    for count in range(2):
        for block, elements in ends.items():
            grad = rng.standard_normal(elements.stop - elements.start).astype(halves.dtype)
            halves[elements] = grad
            blocks = [(block, block + 1)]
            step_blocks(halves, arena, "dynamic", blocks, DEFAULTS, count, fresh=count == 0)
            update, expected[block] = reference.step_leaf(grad, expected[block], count, DEFAULTS)
            same_bits(halves[elements], update)
            mu, nu = expected[block]
            for place, wanted in zip(
                places[block], (mu.codes, nu.codes, mu.scales, nu.scales), strict=True
            ):
                found = stored[place : place + wanted.nbytes].tobytes()
                assert found == wanted.tobytes()

    pages = {p // mmap.PAGESIZE for e in ends.values() for p in (2 * e.start, 2 * e.stop - 1)}
    assert touched_pages(halves) == pages
    pages = {
        p // mmap.PAGESIZE
        for where in places.values()
        for start, length in zip(where, (256, 256, 4, 4), strict=True)
        for p in (start, start + length - 1)
    }
    assert touched_pages(stored) == pages


def map_lazily(nbytes):
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    return memory


def touched_pages(array):
    """Numbers of the pages of a mapping that have memory."""
    num_pages = -(-array.nbytes // mmap.PAGESIZE)
    resident = np.zeros(num_pages, np.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    pointers = ctypes.c_void_p(array.ctypes.data), ctypes.c_void_p(resident.ctypes.data)
    if libc.mincore(pointers[0], ctypes.c_size_t(array.nbytes), pointers[1]):
        raise OSError(ctypes.get_errno(), "mincore")
    return set(np.flatnonzero(resident & 1).tolist())


def test_tied_weights(on_cpu):
    """Kept as two leaves, they drift apart in the ratio format, whose random bits follow names."""
    rng = np.random.default_rng(0)
    params = {name: jax.numpy.ones((64, 128)) for name in ("in", "out")}

    def difference(codec):
        tx = scale_by_paged_adam8bit(quantization=Quantization(codec))
        state, update = tx.init(params), jax.jit(tx.update)
        for _ in range(5):
            grad = jax.numpy.asarray(rng.standard_normal((64, 128)), jax.numpy.float32)
            updates, state = update({"in": grad, "out": grad}, state)
        return np.abs(updates["in"] - updates["out"]).max()

    assert difference("ratio") > 0
    assert difference("dynamic") == 0  # the remedy, where one leaf is not possible
