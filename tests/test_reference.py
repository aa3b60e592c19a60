"""The NumPy reference against optax and against the equations in float64.

The C++ code is compared with `paged_optax._reference` bit for bit, so the reference has to be
right by itself: here nothing of ours checks it.
"""

import contextlib
import itertools
import math

import jax
import ml_dtypes
import numpy as np
import optax
import pytest

from helpers import f32, reference

pytestmark = pytest.mark.fast

BELOW_ONE = float(np.nextafter(f32(1), f32(0)))

HYPERPARAMS = {
    "defaults": reference.Hyperparams(),
    "eps_root": reference.Hyperparams(0.9, 0.999, 1e-8, 1e-4),
    "no momentum": reference.Hyperparams(0.0, 0.99, 1e-6, 0.0),
    "slow": reference.Hyperparams(0.95, 0.99999, 1e-10, 1e-12),
    "sign": reference.Hyperparams(0.9, 0.0, 0.0, 0.0),
}


@contextlib.contextmanager
def optax_on_cpu(x64):
    """`optax.scale_by_adam` raises a float to an int32 count, which strict promotion forbids."""
    with (
        jax.enable_x64(x64),
        jax.numpy_dtype_promotion("standard"),
        jax.default_device(jax.devices("cpu")[0]),
    ):
        yield


@pytest.mark.parametrize("nesterov", [False, True], ids=["plain", "nesterov"])
@pytest.mark.parametrize("hyperparams", HYPERPARAMS.values(), ids=HYPERPARAMS)
def test_float32_moments_follow_optax(hyperparams, nesterov):
    """30 steps beside `optax.scale_by_adam` in float64, from the same float32 inputs.

    In float64, because optax's float32 bias correction is the less exact: 1 - b2 ** count loses
    three digits in the first steps. A moment is a sum of rounded terms, some much larger than the
    sum, so its error is bounded by float32's epsilon times the largest gradient so far.
    """
    size, epsilon = 500, np.finfo(f32).eps
    rng = np.random.default_rng(11)
    scale = np.exp(rng.normal(0, 2, size)).astype(f32)
    state = reference.init_leaf(size, quantized=False)
    with optax_on_cpu(x64=True):
        as_stored = [float(f32(x)) for x in hyperparams]
        tx = optax.scale_by_adam(*as_stored, nesterov=nesterov)
        expected_state = tx.init(np.zeros(size))
        for count in range(30):
            grad = rng.standard_normal(size).astype(f32) * scale
            update, state = reference.step_leaf(grad, state, count, hyperparams, nesterov)
            expected, expected_state = tx.update(grad.astype(np.float64), expected_state)
            assert expected.dtype == np.float64
            largest = 5 * scale
            np.testing.assert_array_less(
                np.abs(state.mu - expected_state.mu), 4 * epsilon * largest
            )
            np.testing.assert_array_less(
                np.abs(state.nu - expected_state.nu), 4 * epsilon * largest**2
            )
            np.testing.assert_allclose(update, expected, rtol=20 * epsilon, atol=20 * epsilon)
    assert update.dtype == f32


def test_float32_moments_follow_optax_in_float32():
    """What a user sees who comes from optax: the same, to four digits.

    optax takes 1 - b2 before it rounds b2 to float32, we after it, as bitsandbytes does: 1.3e-5 of
    the second moment. Its float32 bias correction gives the rest.
    """
    size = 500
    rng = np.random.default_rng(12)
    tx = optax.scale_by_adam()
    state = reference.init_leaf(size, quantized=False)
    with optax_on_cpu(x64=False):
        expected_state = tx.init(np.zeros(size, f32))
        for count in range(30):
            grad = rng.standard_normal(size).astype(f32)
            update, state = reference.step_leaf(grad, state, count, reference.Hyperparams())
            expected, expected_state = tx.update(grad, expected_state)
            np.testing.assert_allclose(state.mu, expected_state.mu, rtol=1e-6, atol=1e-6)
            np.testing.assert_allclose(state.nu, expected_state.nu, rtol=2e-5)
            np.testing.assert_allclose(update, expected, rtol=6e-5, atol=1e-6)


def exact_correction(base, steps):
    """1 - base ** steps without cancellation; ``1 - base`` is exact for floats from 0.5 on."""
    return -math.expm1(steps * math.log1p(-(1.0 - base)))


@pytest.mark.parametrize("count", [0, 1, 9, 999, 10**6, 2**24, 2**31 - 2, 2**31 - 1])
@pytest.mark.parametrize("decay", [0.5, 0.9, 0.999, 0.999999, BELOW_ONE], ids="b={:.8g}".format)
def test_bias_correction(decay, count):
    """To a few roundings of float32, up to a count that fills an int32 (then 2^31 steps)."""
    hyperparams = reference.Hyperparams(decay, decay, 0.0, 0.0)
    b = float(f32(decay))
    mu, nu = np.array([3.0], f32), np.array([7.0], f32)
    update, new_mu, new_nu = reference.adam(np.zeros(1, f32), mu, nu, count, hyperparams)
    correction = exact_correction(b, count + 1)
    expected = (float(new_mu[0]) / correction) / math.sqrt(float(new_nu[0]) / correction)
    np.testing.assert_allclose(update, expected, rtol=4e-7)

    update, new_mu, new_nu = reference.adam(mu, mu, nu, count, hyperparams, nesterov=True)
    mu_hat = b * float(new_mu[0]) / exact_correction(b, count + 2)
    mu_hat += (1 - b) * 3.0 / correction
    expected = mu_hat / math.sqrt(float(new_nu[0]) / correction)
    np.testing.assert_allclose(update, expected, rtol=5e-7)


def test_first_step_is_the_sign_of_the_gradient():
    grad = np.array([1e-6, -2.0, 3e8, 0.0], f32)
    update, _ = reference.step_leaf(
        grad, reference.init_leaf(4, quantized=False), 0, reference.Hyperparams(eps=0.0)
    )
    np.testing.assert_allclose(update[:3], np.sign(grad[:3]), rtol=3e-7)
    assert np.isnan(update[3])  # without eps 0 / 0, as in optax


@pytest.mark.parametrize("quantized", [False, True], ids=["float32", "dynamic"])
@pytest.mark.parametrize("dtype", [f32, ml_dtypes.bfloat16, np.float16], ids=lambda d: d.__name__)
@pytest.mark.parametrize("shape", [(), (0,), (5,), (3, 100), (2, 3, 4)], ids=str)
def test_shapes_and_dtypes(shape, dtype, quantized):
    grad = np.full(shape, 0.5, dtype)
    state = reference.init_leaf(grad.size, quantized)
    update, state = reference.step_leaf(grad, state, 0, reference.Hyperparams())
    assert update.shape == shape and update.dtype == grad.dtype
    np.testing.assert_allclose(update.astype(f32), np.ones(shape, f32), rtol=3e-7)
    blocks = -(-grad.size // reference.BLOCK_SIZE)
    if quantized:
        for moment in state:
            assert moment.codes.dtype == np.uint8 and moment.scales.dtype == f32
            assert moment.codes.shape == (256 * blocks,) and moment.scales.shape == (blocks,)
    else:
        assert state.mu.shape == state.nu.shape == (grad.size,)


def test_quantized_update_uses_moments_before_quantization():
    """From moments of zero the update is the float32 one; only what is stored differs."""
    grad = np.random.default_rng(0).standard_normal(1000).astype(f32)
    runs = [
        reference.step_leaf(grad, reference.init_leaf(1000, q), 0, reference.Hyperparams())
        for q in (False, True)
    ]
    np.testing.assert_array_equal(runs[0][0], runs[1][0])
    stored = reference.dequantize(runs[1][1].mu, signed=True)[:1000]
    assert np.any(stored != runs[0][1].mu)
    np.testing.assert_allclose(stored, runs[0][1].mu, atol=0.0071 * np.abs(grad).max() / 10)


def test_dequantize():
    codes = np.arange(512, dtype=np.uint8)
    scales = np.array([2.0, 0.5], f32)
    for signed in (True, False):
        table = reference.dynamic_map(signed)
        values = reference.dequantize(reference.Quantized(codes, scales), signed)
        np.testing.assert_array_equal(values, np.concatenate([table * f32(2), table * f32(0.5)]))
    with np.errstate(over="ignore"):
        assert not reference.dequantize(reference.quantize(np.zeros(3, f32), True), True).any()


@pytest.mark.parametrize(
    "bad", [np.nan, np.inf, -np.inf, 3e38, -1e30], ids=["nan", "inf", "-inf", "3e38", "-1e30"]
)
def test_non_finite_gradients_keep_moments(bad):
    """Also a finite gradient whose square overflows, (1 - b2) and all."""
    mu, nu = np.array([0.1, 0.2, -0.3], f32), np.array([0.01, 0.02, 0.03], f32)
    for nesterov, position in itertools.product((False, True), range(3)):
        grad = np.array([1.0, 2.0, 3.0], f32)
        expected = reference.adam(grad, mu, nu, 5, reference.Hyperparams(), nesterov)
        grad[position] = bad
        actual = reference.adam(grad, mu, nu, 5, reference.Hyperparams(), nesterov)
        others = np.arange(3) != position
        for got, want in zip(actual, expected, strict=True):
            np.testing.assert_array_equal(got[others], want[others])
        update, new_mu, new_nu = actual
        assert np.isnan(update[position])
        assert new_mu[position] == mu[position] and new_nu[position] == nu[position]
