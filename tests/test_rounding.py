"""Parameters of 16 bits that learn: rounding, residuals, and updates that land where they should.

The oracle for rounding is the sorted list of all numbers of a type; the compiled step is compared
with the NumPy reference bit for bit, and training with float32 parameters.
"""

import functools

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import helpers
import paged_optax
from helpers import (
    QUANTIZED,
    arena_bytes,
    assert_trees_equal,
    f32,
    find_state,
    finish,
    layout_bytes,
    reference,
    residuals_of,
    same_bits,
    train,
)
from optimizers import BY_NAME, Specification, assert_as_specified
from paged_optax import (
    Quantization,
    memory_report,
    paged_adam8bit,
    paged_adamw8bit,
    release,
)

HALVES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
MODES = ["stochastic", "compensated"]


@pytest.fixture(params=HALVES.values(), ids=HALVES)
def half(request):
    return request.param


@functools.cache
def all_numbers(dtype):
    """All finite numbers of a type, ascending, as float64; zero once."""
    with np.errstate(invalid="ignore"):  # signalling NaNs
        values = np.arange(2**16, dtype=np.uint16).view(dtype).astype(np.float64)
    return np.unique(values[np.isfinite(values)])


def random_masters(dtype, size, seed=0):
    """float32 numbers of all magnitudes of a type, inside its range."""
    rng = np.random.default_rng(seed)
    low, high = (-30, 15) if dtype == np.float16 else (-120, 120)
    return (rng.choice([-1, 1], size) * 2 ** rng.uniform(low, high, size)).astype(f32)


def every(bits):
    """All values of the leading `bits` bits of a random word."""
    return (np.arange(2**bits, dtype=np.uint64) << np.uint64(32 - bits)).astype(np.uint32)


# ------------------------------------------------------------------------ the specification


@pytest.mark.fast
def test_stochastic_rounding_goes_to_a_neighbour_and_is_exact_on_average(half):
    numbers, bits = all_numbers(half), reference.dropped_bits(half)
    random = every(bits)
    for x in random_masters(half, 200):
        rounded = reference.round_stochastically(np.full(random.size, x), random, half)
        above = np.searchsorted(numbers, np.float64(x), side="left")
        neighbours = numbers[above - 1 : above + 1]
        values = rounded.astype(np.float64)
        assert np.isin(values, neighbours).all()
        # Below half precision's normal numbers x itself is first rounded, to 2^-13 of a unit.
        error = abs(values.mean() - np.float64(x)) / np.diff(neighbours)[0]
        assert error == 0 if abs(x) >= 2.0**-14 else error <= 2.0**-14


def test_what_is_representable_is_not_rounded(half):
    x = all_numbers(half).astype(f32)
    for random in (0, 2**32 - 1):
        random = np.full(x.size, random, np.uint32)
        np.testing.assert_array_equal(reference.round_stochastically(x, random, half), x)
        params, residuals = reference.split_master(x, random, half)
        np.testing.assert_array_equal(params, x)
        assert np.all(residuals == reference.ZERO_RESIDUAL)


def test_master_weights_are_exact_on_average(half):
    unit_bits = reference.dropped_bits(half) - 8
    random = every(unit_bits)
    for x in random_masters(half, 2000):
        if abs(x) < 2.0**-14 and half == np.float16:
            continue
        params, residuals = reference.split_master(np.full(random.size, x), random, half)
        masters = reference.join_master(params, residuals).astype(np.float64)
        assert masters.mean() == np.float64(x)
        # 8 bits behind the significand of 8 or 11 bits
        unit = 2.0 ** (np.floor(np.log2(abs(x))) - (18 if half == np.float16 else 15))
        assert np.all(np.abs(masters - np.float64(x)) < unit)


def test_parameter_is_the_nearest_to_its_master(half):
    numbers = all_numbers(half)
    x = random_masters(half, 100_000)
    random = np.random.default_rng(1).integers(0, 2**32, x.size, np.uint32)
    params, residuals = reference.split_master(x, random, half)
    masters = reference.join_master(params, residuals).astype(np.float64)
    kept = params != 0
    above = np.clip(np.searchsorted(numbers, masters), 1, numbers.size - 1)
    nearest = np.minimum(abs(masters - numbers[above]), abs(masters - numbers[above - 1]))
    distance = abs(masters - params.astype(np.float64))
    np.testing.assert_array_equal(distance[kept], nearest[kept])


def test_every_parameter_with_every_residual_survives(half):
    """(parameter, residual) -> master weight -> the same pair, whatever the random bits."""
    params = np.arange(2**16, dtype=np.uint16).view(half)
    with np.errstate(invalid="ignore"):
        params = params[np.isfinite(params.astype(f32)) & (params.astype(f32) != 0)]
    largest = np.max(params.astype(f32))
    for residual in range(256):
        residuals = np.full(params.size, residual, np.uint8)
        masters = reference.join_master(params, residuals)
        assert np.isfinite(masters).all()
        random = np.full(params.size, 2**32 - 1 if residual % 2 else 0, np.uint32)
        again, kept = reference.split_master(masters, random, half)
        np.testing.assert_array_equal(again.view(np.uint16), params.view(np.uint16))
        np.testing.assert_array_equal(kept, residuals)
    assert largest in params.astype(f32)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e38, -1e38, 0.0, -0.0], ids=str)
def test_special_values(half, value):
    x = np.full(4, value, f32)
    random = np.array([0, 1, 2**31, 2**32 - 1], np.uint32)
    with np.errstate(over="ignore"):
        expected = x.astype(half)
    if np.isfinite(value) and half != np.float16 and value:
        return  # representable up to rounding
    for rounded in (
        reference.round_stochastically(x, random, half),
        reference.split_master(x, random, half)[0],
    ):
        np.testing.assert_array_equal(rounded.astype(f32), expected.astype(f32))
    residuals = np.array([0, 255, 128, 7], np.uint8)
    joined = reference.join_master(expected, residuals)
    if value == 0:
        np.testing.assert_array_equal(joined, x)  # never a number behind the other sign, or NaN


# --------------------------------------------------------------- the compiled step, to the bit


def specify(params, rounding, **quantization):
    return Specification.fresh(
        BY_NAME["adamw"], params, Quantization(**quantization), rounding=rounding
    )


def make_tree(seed, dtypes, shapes, spread=2.0, scale=1.0):
    """Normal numbers of many magnitudes."""
    return helpers.make_tree(seed, shapes, dtypes, spread=spread, scale=scale)


def parameters_after(tx, params, grads):
    return train(tx, params, grads)[0]


BF16, F16 = ml_dtypes.bfloat16, np.float16
SHAPES = {
    "a": (65, 77),
    "b": (300,),
    "c": (5, 1000),
    "d": (),
    "e": (0, 3),
    "f": (4096,),
    "g": (257,),
}
PARAM_DTYPES = {"a": BF16, "b": BF16, "c": F16, "d": F16, "e": BF16, "f": f32, "g": f32}
GRAD_DTYPES = {
    "as the parameters": PARAM_DTYPES,
    "float32": dict.fromkeys(PARAM_DTYPES, f32),
    "others": {"a": F16, "b": f32, "c": BF16, "d": f32, "e": f32, "f": BF16, "g": F16},
}


@pytest.mark.parametrize("codec", QUANTIZED)
@pytest.mark.parametrize("grad_dtypes", GRAD_DTYPES.values(), ids=GRAD_DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_same_bits_as_the_reference(device, mode, grad_dtypes, codec):
    """Every dtype, small and large leaves, a mask, schedules of learning rate and weight decay."""
    lr = lambda count: 1e-2 / (1 + jnp.asarray(count, jnp.float32))  # noqa: E731
    decay = lambda count: jnp.where(count < 3, 0.1, 0.01)  # noqa: E731
    mask = lambda tree: {k: k not in "bc" for k in tree}  # noqa: E731
    quantization = Quantization(codec, seed=5)
    tx = paged_adamw8bit(
        lr, weight_decay=decay, mask=mask, param_rounding=mode, quantization=quantization
    )
    params = make_tree(0, PARAM_DTYPES, SHAPES, scale=0.1)
    params["a"].ravel()[:4] = [0.0, -0.0, np.inf, np.nan]
    params["c"].ravel()[:4] = [0.0, -0.0, 6e-8, 65504.0]
    expected = specify(params, mode, codec=codec, seed=5)
    on_device = jax.device_put(params, device)
    state = jax.device_put(tx.init(on_device), device)
    update = jax.jit(tx.update)
    for count in range(6):
        grads = make_tree(10 + count, grad_dtypes, SHAPES)
        grads["a"].ravel()[7] = np.nan
        lr_now = f32(lr(np.int32(count)))
        decay_now = f32(decay(np.int32(count)))
        wanted, expected = expected.update(grads, params, lr_now, decay_now, masked="bc")
        updates, state = update(jax.device_put(grads, device), state, on_device)
        for k in params:
            same_bits(updates[k], wanted[k], f"{k} at step {count}")
        with jax.numpy_dtype_promotion("standard"):
            on_device = optax.apply_updates(on_device, updates)
        params = {k: np.array(x) for k, x in on_device.items()}
        params["a"].ravel()[8:20] = params["a"].ravel()[20:8:-1]  # someone else changes parameters
        on_device = jax.device_put(params, device)
    for index, k in enumerate(params):
        if mode == "compensated" and params[k].dtype != f32:
            stored = residuals_of(state, index)
            np.testing.assert_array_equal(stored[: params[k].size], expected.residuals[k], k)
    assert_as_specified(state, expected)


@pytest.mark.parametrize("mode", MODES)
def test_every_parameter(device, half, mode):
    """All 65,536 bit patterns of a parameter, with steps from far below to far above it."""
    params = {"p": np.arange(2**16, dtype=np.uint16).view(half)}
    for lr in (1e-6, 1e-3, 1.0):
        tx = paged_adam8bit(lr, param_rounding=mode)
        expected = specify(params, mode)
        state = jax.device_put(tx.init(params), device)
        update = jax.jit(tx.update)
        for count in range(3):
            grads = make_tree(count, {"p": half}, {"p": (2**16,)}, spread=1.0)
            wanted, expected = expected.update(grads, params, f32(lr), 0.0)
            updates, state = update(
                jax.device_put(grads, device), state, jax.device_put(params, device)
            )
            same_bits(updates["p"], wanted["p"], f"step {count}")
        if mode == "compensated":
            np.testing.assert_array_equal(residuals_of(state, 0), expected.residuals["p"])
        release(state)


def test_more_than_a_chunk(device):
    """2,688 blocks with residuals fill a chunk of 2 MiB."""
    shapes = {"a": (2800, 256), "b": (1000,), "c": (300, 257)}
    dtypes = dict.fromkeys(shapes, BF16)
    params = make_tree(0, dtypes, shapes)
    tx = paged_adamw8bit(1e-3, param_rounding="compensated", replay=True)
    expected = specify(params, "compensated")
    state, update = jax.device_put(tx.init(params), device), jax.jit(tx.update)
    for count in range(3):
        grads = make_tree(count + 1, dtypes, shapes)
        wanted, expected = expected.update(grads, params, f32(1e-3), f32(1e-4))
        updates, state = update(
            jax.device_put(grads, device), state, jax.device_put(params, device)
        )
        for k in shapes:
            same_bits(updates[k], wanted[k], k)
    for index, k in enumerate(shapes):
        np.testing.assert_array_equal(
            residuals_of(state, index)[: params[k].size], expected.residuals[k]
        )
    assert_as_specified(state, expected)


@pytest.mark.parametrize("num_float32", [0, 1, 5000])
@pytest.mark.parametrize("num_dynamic", [0, 1, 2687, 2688, 2689, 10**6])
def test_arena_bytes(num_dynamic, num_float32):
    actual = arena_bytes(num_dynamic, num_float32, has_residuals=True)
    assert actual == layout_bytes(num_dynamic, num_float32, has_residuals=True)


def test_three_bytes_a_parameter():
    params = {"w": jnp.ones((1024, 1024), jnp.bfloat16)}
    sizes = {}
    for mode in ("nearest", *MODES):
        tx = paged_adamw8bit(1e-3, param_rounding=mode)
        _, state = tx.update(params, tx.init(params), params)
        sizes[mode] = memory_report(state).total / 2**20
    assert sizes["nearest"] == sizes["stochastic"]
    assert 2.03 < sizes["nearest"] < 2.04 and 3.03 < sizes["compensated"] < 3.05


def test_float32_parameters_keep_no_residuals():
    params = {"w": jnp.ones((64, 64))}
    for mode in ("nearest", "compensated"):
        tx = paged_adamw8bit(1e-3, param_rounding=mode)
        _, state = tx.update(params, tx.init(params), params)
        assert memory_report(state).total == 17 * 512  # 16 blocks of 520, rounded up


# ------------------------------------------------------------------------- where updates land


@pytest.mark.parametrize("donate", [False, True], ids=["kept", "donated"])
@pytest.mark.parametrize("mode", MODES)
def test_sums_land_on_the_rounded_parameter(device, half, mode, donate):
    """p + u needs no rounding, eager or fused, where p' is within a factor of 2 of p."""
    tx = paged_adamw8bit(1e-2, weight_decay=0.1, param_rounding=mode)

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2) if donate else ())
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        # Uses of the sum in one fusion: XLA may leave out a rounding that it does not see.
        new = optax.apply_updates(params, updates)
        return new, new["p"].astype(jnp.float32) * 1.0, updates, state

    params = make_tree(0, {"p": half}, {"p": (300, 257)}, spread=1.0)
    state = tx.init(params)
    for count in range(4):
        grads = make_tree(count, {"p": half}, {"p": (300, 257)})
        new, seen, updates, state = step(
            jax.device_put(params, device), jax.device_put(state, device), jax.device_put(grads)
        )
        p, u, q = (np.asarray(x["p"], np.float64) for x in (params, updates, new))
        close = (q * p > 0) & (abs(q) <= 2 * abs(p)) & (abs(p) <= 2 * abs(q))
        assert close.mean() > 0.9
        np.testing.assert_array_equal((p + u)[close], q[close])
        np.testing.assert_array_equal(np.asarray(seen, np.float64)[close], q[close])
        eager = optax.apply_updates({"p": jnp.asarray(params["p"])}, updates)
        np.testing.assert_array_equal(eager["p"], new["p"])
        params = jax.device_get(new)


def test_where_the_sum_cannot_land_exactly(half):
    """Steps of the parameter's size, through zero: within a unit or two of the exact result."""
    params = make_tree(3, {"p": half}, {"p": (64, 64)}, spread=1.5, scale=1e-3)
    grads = make_tree(4, {"p": half}, {"p": (64, 64)})
    tx = paged_adam8bit(1e-3, param_rounding="compensated")
    updates, state = tx.update(grads, tx.init(params), params)
    new = np.asarray(optax.apply_updates(params, updates)["p"]).ravel()
    p = params["p"].astype(np.float64).ravel()
    exact = p - 1e-3 * np.sign(grads["p"].astype(np.float64).ravel())

    def unit(x):
        if half == np.float16:
            return np.maximum(2.0 ** (np.floor(np.log2(np.abs(x))) - 10), 2.0**-24)
        return 2.0 ** (np.floor(np.log2(np.abs(x))) - 7)

    # half a unit each for p', for u and for the sum; 1e-9 for the quotient that makes 1e-3
    bound = unit(exact) + unit(1e-3) / 2 + 1e-9
    assert np.all(abs(new.astype(np.float64) - exact) < bound)
    crossed = new.astype(np.float64) * p < 0
    assert crossed.sum() > 300
    # Where it landed elsewhere there is no residual of another parameter.
    masters = reference.join_master(new, residuals_of(state, 0)[: new.size]).astype(np.float64)
    assert np.all(abs(masters - exact) < bound)


def test_float32_parameters_take_ordinary_steps(device):
    """As optax.adamw's chain behind the same direction, up to XLA's fusion."""
    params = make_tree(0, {"p": f32}, {"p": (300, 257)})
    grads = make_tree(1, {"p": f32}, {"p": (300, 257)})
    results = []
    for mode in ("nearest", *MODES):
        tx = paged_adamw8bit(1e-2, weight_decay=0.1, param_rounding=mode)
        state = tx.init(params)
        for _ in range(3):
            updates, state = jax.jit(tx.update)(grads, state, params)
        results.append(np.asarray(updates["p"]))
    np.testing.assert_allclose(results[1], results[0], rtol=1e-5, atol=1e-9)
    np.testing.assert_array_equal(results[1], results[2])


# --------------------------------------------------------------------------------- learning


def train_flat(mode, dtype, num_steps, grads_of, lr=1e-3, start=1.0, seed=0, size=4096):
    tx = paged_adam8bit(
        lr, param_rounding=mode, quantization=Quantization(min_size=2**62, seed=seed)
    )
    params = {"p": jnp.full(size, start, dtype)}

    @jax.jit
    def step(carry, count):
        params, state = carry
        updates, state = tx.update(grads_of(params, count), state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, state), _ = jax.lax.scan(step, (params, tx.init(params)), jnp.arange(num_steps))
    return np.asarray(params["p"]), state


def constant_gradient(params, count):
    del count
    return jax.tree.map(jnp.ones_like, params)


def test_small_steps_are_not_lost():
    """200 steps of -1e-3 from 1, where numbers are 2^-8 apart: 0.8 on average, and not 1."""
    nearest, _ = train_flat("nearest", jnp.bfloat16, 200, constant_gradient)
    np.testing.assert_array_equal(nearest.astype(f32), 1.0)  # what optax.adam does, too

    stochastic, _ = train_flat("stochastic", jnp.bfloat16, 200, constant_gradient)
    values = stochastic.astype(np.float64)
    # A step changes a parameter by a unit of 2^-8 with probability 1e-3 / 2^-8, or not at all.
    unit, chance = 2.0**-8, 1e-3 * 2**8
    deviation = np.sqrt(200 * chance * (1 - chance)) * unit
    assert abs(values.mean() - 0.8) < 4 * deviation / np.sqrt(values.size)
    assert 0.9 < values.std() / deviation < 1.1

    compensated, state = train_flat("compensated", jnp.bfloat16, 200, constant_gradient)
    masters = reference.join_master(compensated, residuals_of(state, 0)).astype(np.float64)
    unit = 2.0**-16  # of the residual
    assert np.all(abs(compensated.astype(np.float64) - masters) <= 2.0**-9)
    assert abs(masters.mean() - 0.8) < 1e-5
    assert masters.std() < np.sqrt(200) * unit


@pytest.mark.parametrize("mode", MODES)
def test_steps_far_below_the_last_place_add_up(half, mode):
    """3,000 steps of a quarter of a residual's unit: 1/1,024 of the parameter's."""
    lr = 2.0**-18 if half == ml_dtypes.bfloat16 else 2.0**-21
    values, state = train_flat(mode, half, 3000, constant_gradient, lr=lr)
    if mode == "compensated":
        values = reference.join_master(values, residuals_of(state, 0))
    moved = 1 - values.astype(np.float64).mean()
    tolerance = 0.15 if mode == "stochastic" else 0.01
    assert abs(moved / (3000 * lr) - 1) < tolerance


def test_compensation_follows_float32_master_weights():
    """The same 1,000 noisy gradients: float32, and bfloat16 in three ways."""
    rng = np.random.default_rng(0)
    drift = jnp.asarray(rng.standard_normal(4096), jnp.float32)

    def noisy(params, count):
        noise = jax.random.normal(jax.random.key(count), (4096,), jnp.float32)
        return {"p": (0.3 * drift + noise).astype(params["p"].dtype)}

    def bf16_gradients(params, count):  # the same ones for float32 parameters
        return {"p": noisy({"p": jnp.zeros(1, jnp.bfloat16)}, count)["p"].astype(params["p"].dtype)}

    lr, start = 1e-4, 0.05
    exact, _ = train_flat("nearest", jnp.float32, 1000, bf16_gradients, lr, start)
    moved = np.sqrt(np.mean((exact - f32(start)) ** 2))
    errors = {}
    for mode in ("nearest", *MODES):
        values, state = train_flat(mode, jnp.bfloat16, 1000, bf16_gradients, lr, start)
        errors[mode] = np.sqrt(np.mean((values.astype(f32) - exact) ** 2)) / moved
        if mode == "compensated":
            masters = reference.join_master(values, residuals_of(state, 0))
            error = np.sqrt(np.mean((masters - exact) ** 2))
            # A random walk: 1,000 roundings of at most half a unit, parameters below 0.25.
            assert error < np.sqrt(1000) * 2.0**-18 / 2
    assert errors["compensated"] < 0.01
    assert errors["compensated"] < errors["stochastic"] / 3 < errors["nearest"] / 3


def test_training_in_bfloat16_ends_where_float32_does():
    """Least squares with a small learning rate: compensation reaches float32's loss."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((256, 64)), jnp.float32)
    y = x @ jnp.asarray(rng.standard_normal((64, 64)), jnp.float32)

    def loss(params):
        return jnp.mean((x @ params["w"].astype(jnp.float32) - y) ** 2)

    def run(mode, dtype):
        tx = paged_adam8bit(3e-4, param_rounding=mode)
        params = {"w": jnp.full((64, 64), 2.0, dtype)}

        @jax.jit
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), length=1500)
        return float(loss(params) / loss({"w": jnp.full((64, 64), 2.0)}))

    exact = run("nearest", jnp.float32)
    assert abs(run("compensated", jnp.bfloat16) / exact - 1) < 0.01
    assert abs(run("stochastic", jnp.bfloat16) / exact - 1) < 0.05
    assert exact < 0.7
    assert run("nearest", jnp.bfloat16) == 1.0  # no parameter ever moved


# ------------------------------------------------------------------------- ways to run a step


@pytest.fixture(params=MODES)
def task(request):
    """A transformation, parameters, gradients of four steps, and the parameters after them."""
    shapes = {"w": (70, 70), "b": (30,), "g": (300,)}
    dtypes = {"w": BF16, "b": F16, "g": f32}
    tx = paged_adamw8bit(1e-2, weight_decay=0.1, param_rounding=request.param)
    params = jax.device_put(make_tree(0, dtypes, shapes))
    grads = [jax.device_put(make_tree(i, dtypes, shapes)) for i in range(1, 5)]
    return tx, params, grads, parameters_after(tx, params, grads)


def test_eager(task):
    tx, params, grads, expected = task
    state = tx.init(params)
    for grad in grads:
        updates, state = tx.update(grad, state, params)
        assert jax.tree.map(lambda u: u.dtype, updates) == jax.tree.map(lambda g: g.dtype, grad)
        params = optax.apply_updates(params, updates)
    assert_trees_equal(params, expected)


def test_scan_and_donation(task):
    tx, params, grads, expected = task

    @functools.partial(jax.jit, donate_argnums=0)
    def run(params, grads):
        def step(carry, grads):
            updates, state = tx.update(grads, carry[1], carry[0])
            return (optax.apply_updates(carry[0], updates), state), None

        stacked = jax.tree.map(lambda *x: jnp.stack(x), *grads)
        (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), stacked)
        return params

    assert_trees_equal(run(jax.tree.map(jnp.copy, params), grads), expected)


def test_updates_take_the_place_of_gradients(task):
    tx, params, grads, _ = task
    state = tx.init(params)
    step = jax.jit(lambda g, s, p: tx.update(g, s, p), donate_argnums=0)
    compiled = step.lower(grads[0], state, params).compile()
    wanted = sum(x.nbytes for x in grads[0].values())
    assert compiled.memory_analysis().alias_size_in_bytes >= wanted


def test_retry_with_replay(task):
    _, params, grads, _ = task
    for mode in MODES:
        tx = paged_adamw8bit(1e-2, param_rounding=mode, replay=True)
        state, update, now = tx.init(params), jax.jit(tx.update), params
        for grad in grads:
            first, _ = update(grads[0], state, now)
            again, _ = update(grads[0], state, now)
            assert_trees_equal(again, first)
            updates, state = update(grad, state, now)
            now = optax.apply_updates(now, updates)
        assert_trees_equal(now, parameters_after(tx, params, grads))


def test_accumulation(task):
    """Two equal micro-steps a cycle: optax.MultiSteps with replay, and ours."""
    tx, params, grads, expected = task
    for wrapped in (
        paged_optax.MultiSteps(tx, 2, accumulator_dtype=None).gradient_transformation(),
    ):
        state, now = wrapped.init(params), params
        for grad in grads:
            for _ in range(2):
                updates, state = jax.jit(wrapped.update)(grad, state, now)
                now = optax.apply_updates(now, updates)
        assert_trees_equal(now, expected)


def test_order_of_the_tree_does_not_matter(task):
    """Random bits belong to the names of the leaves."""
    tx, params, grads, expected = task

    def rename(tree):
        return {"x": tree}

    other = parameters_after(tx, rename(params), [rename(grad) for grad in grads])["x"]
    assert_trees_equal(other["g"], expected["g"])
    assert np.any(np.asarray(other["w"] != expected["w"]))  # other names, other bits
    subset = {"w": params["w"]}
    alone = parameters_after(tx, subset, [{"w": grad["w"]} for grad in grads])
    assert_trees_equal(alone["w"], expected["w"])


def test_seed(task):
    _, params, grads, expected = task
    for mode in MODES:
        runs = [
            parameters_after(
                paged_adamw8bit(1e-2, param_rounding=mode, quantization=Quantization(seed=seed)),
                params,
                grads,
            )
            for seed in (0, 1, 1)
        ]
        assert_trees_equal(runs[1], runs[2])
        assert np.any(np.asarray(runs[0]["w"] != runs[1]["w"]))


@pytest.mark.parametrize("mode", MODES)
def test_inject_hyperparams(mode):
    params = jax.device_put(make_tree(0, {"w": BF16, "b": f32}, {"w": (70, 70), "b": (9,)}))
    grads = [
        jax.device_put(make_tree(i, {"w": BF16, "b": f32}, {"w": (70, 70), "b": (9,)}))
        for i in range(1, 4)
    ]
    tx = optax.inject_hyperparams(
        paged_adamw8bit, static_args=("mask",), hyperparam_dtype=jnp.float32
    )(learning_rate=1.0, weight_decay=0.1, param_rounding=mode, non_finite="skip_step")
    state, update = tx.init(params), jax.jit(tx.update)
    now = params
    for grad in grads:
        state.hyperparams["learning_rate"] = jnp.float32(1e-2)
        updates, state = update(grad, state, now)
        now = optax.apply_updates(now, updates)
    expected = parameters_after(
        paged_adamw8bit(1e-2, weight_decay=0.1, param_rounding=mode), params, grads
    )
    assert_trees_equal(now, expected)


@pytest.mark.parametrize(
    "mask", [{"w": True, "b": False}, lambda tree: {"w": True, "b": False}, {"w": {"x": True}}]
)
def test_mask(mask):
    """Without gradients only the decay moves anything."""
    if callable(mask) or "b" in mask:
        params = {"w": jnp.ones((64, 64), jnp.bfloat16), "b": jnp.ones(9)}
    else:
        params = {"w": {"x": jnp.ones((64, 64), jnp.bfloat16)}}
    grads = jax.tree.map(jnp.zeros_like, params)
    tx = paged_adamw8bit(1.0, weight_decay=0.25, mask=mask, param_rounding="compensated")
    updates, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_array_equal(jax.tree.leaves(updates["w"])[0].astype(jnp.float32), -0.25)
    if "b" in params:
        np.testing.assert_array_equal(updates["b"], 0.0)


@pytest.mark.parametrize("leaf", ["no", 0, None, np.zeros(2, bool)], ids=repr)
def test_mask_of_something_else(leaf):
    """ "no" would count as True."""
    params = {"w": jnp.ones((64, 64), jnp.bfloat16)}
    tx = paged_adamw8bit(1.0, mask={"w": leaf}, param_rounding="compensated")
    with pytest.raises((TypeError, ValueError), match="mask has the leaf|None|structure"):
        tx.update(params, tx.init(params), params)


def test_wrappers(task):
    """What passes updates on: masked, partition, apply_if_finite, a chain before it."""
    tx, params, grads, expected = task
    for wrapped in (
        optax.chain(optax.identity(), tx),
        optax.masked(tx, {"w": True, "b": True, "g": True}),
        optax.partition({"ours": tx}, {"w": "ours", "b": "ours", "g": "ours"}),
        optax.with_extra_args_support(tx),
    ):
        assert_trees_equal(parameters_after(wrapped, params, grads), expected)


def test_nnx_optimizer():
    class Model(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jnp.ones((64, 64), jnp.bfloat16))

    for mode, moves in (("nearest", False), ("stochastic", True), ("compensated", True)):
        model = Model()
        optimizer = nnx.Optimizer(model, paged_adamw8bit(1e-3, param_rounding=mode), wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer):
            grads = nnx.grad(lambda m: jnp.sum(m.w[...].astype(jnp.float32)))(model)
            optimizer.update(model, grads)

        for _ in range(20):
            step(model, optimizer)
        assert bool(jnp.any(model.w[...] < 1)) == moves
        assert memory_report(optimizer).total > 0


def test_train_state(task):
    tx, params, grads, expected = task
    state = TrainState.create(apply_fn=None, params=params, tx=tx)
    step = jax.jit(lambda state, grad: state.apply_gradients(grads=grad))
    for grad in grads:
        state = step(state, grad)
    assert_trees_equal(state.params, expected)


# ---------------------------------------------------------------------------------- devices


@pytest.mark.fast
@pytest.mark.parametrize("kind", ["Auto", "Explicit", "Manual"])
@pytest.mark.parametrize("mode", MODES)
def test_shards(mode, kind):
    """Each device rounds its shard as if it were a leaf: the reference, shard by shard."""
    devices = jax.devices("cpu")[:8]
    axis_type = AxisType.Explicit if kind == "Explicit" else AxisType.Auto
    mesh = jax.make_mesh((8,), ("x",), axis_types=(axis_type,), devices=devices)
    specs = {"w": P("x"), "r": P()}
    shapes = {"w": (512, 160), "r": (5000,)}
    dtypes = dict.fromkeys(shapes, BF16)
    params = make_tree(0, dtypes, shapes)
    tx = paged_adamw8bit(1e-2, weight_decay=0.1, param_rounding=mode)

    def put(tree):
        return {k: jax.device_put(x, NamedSharding(mesh, specs[k])) for k, x in tree.items()}

    update = tx.update
    if kind == "Manual":
        update = jax.shard_map(
            tx.update,
            mesh=mesh,
            in_specs=(specs, P(), specs),
            out_specs=(specs, P()),
            check_vma=False,
        )
    update = jax.jit(update)
    parts = [
        {"w": params["w"][i * 64 : (i + 1) * 64], "r": params["r"]} for i in range(8)
    ]  # of the devices
    expected = [specify(part, mode) for part in parts]
    with jax.set_mesh(mesh):
        state, now = tx.init(put(params)), put(params)
        for count in range(3):
            grads = make_tree(count + 1, dtypes, shapes)
            if count == 0:
                text = update.lower(put(grads), state, now).compile().as_text()
                assert not any(x in text for x in ("all-gather", "all-reduce", "all-to-all"))
            updates, state = update(put(grads), state, now)
            for i in range(8):
                part = {"w": grads["w"][i * 64 : (i + 1) * 64], "r": grads["r"]}
                wanted, expected[i] = expected[i].update(part, parts[i], f32(1e-2), f32(0.1))
                for k in shapes:
                    shard = updates[k].addressable_shards[i]
                    assert shard.device == devices[i]
                    same_bits(shard.data, wanted[k], f"{k} on device {i} at step {count}")
            now = optax.apply_updates(now, updates)
            for i in range(8):
                parts[i] = {k: np.asarray(now[k].addressable_shards[i].data) for k in shapes}


# ----------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("mode", ["Nearest", "random", None, 1])
def test_unknown_rounding(mode):
    with pytest.raises(ValueError, match="param_rounding is .*; it must be one of nearest, stoch"):
        paged_adamw8bit(1e-3, param_rounding=mode)


def test_parameters_are_needed():
    params = {"w": jnp.ones(3)}
    tx = paged_adam8bit(1e-3, param_rounding="stochastic")
    with pytest.raises(ValueError, match="needs the parameters: pass them to update"):
        tx.update(params, tx.init(params))


def test_seed_must_be_an_int():
    with pytest.raises(TypeError, match="seed is 1.5; it must be an int"):
        Quantization(seed=1.5)


@pytest.mark.parametrize("first, then", [("nearest", "compensated"), ("compensated", "nearest")])
def test_residuals_cannot_come_or_go(first, then):
    params = {"w": jnp.ones((64, 64), jnp.bfloat16)}
    _, state = paged_adam8bit(1e-3, param_rounding=first).update(
        params, paged_adam8bit(1e-3, param_rounding=first).init(params), params
    )
    state = find_state(state)
    tx = paged_adam8bit(1e-3, param_rounding=then)
    if then == "nearest":
        tx = paged_optax.scale_by_paged_adam8bit()
    who, other = ("the state", "this step")[:: 1 if first == "compensated" else -1]
    message = f"{who} keeps residuals of 16-bit parameters and {other} does not"
    with pytest.raises((RuntimeError, ValueError), match=message):
        finish(tx.update(params, state, params))


def test_stochastic_and_nearest_take_turns():
    """They store the same; only the update differs."""
    params = {"w": jnp.ones((64, 64), jnp.bfloat16)}
    _, state = paged_optax.scale_by_paged_adam8bit().update(
        params, paged_optax.scale_by_paged_adam8bit().init(params)
    )
    updates, _ = paged_adam8bit(1e-3, param_rounding="stochastic").update(params, state, params)
    assert 0.2 < np.mean(np.asarray(updates["w"]) != 0) < 0.3


def test_differentiation_is_refused():
    params = {"w": jnp.ones((64, 64), jnp.bfloat16)}
    tx = paged_adam8bit(1e-3, param_rounding="stochastic")
    state = tx.init(params)

    def loss(params):
        updates, _ = tx.update(jax.tree.map(jax.lax.stop_gradient, params), state, params)
        return jnp.sum(updates["w"].astype(jnp.float32))

    with pytest.raises(TypeError, match="cannot be differentiated"):
        jax.grad(loss)(params)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"learning_rate": None}, TypeError, "learning_rate is None"),
        ({"learning_rate": 1e-3, "weight_decay": None}, TypeError, "weight_decay is None"),
        ({"learning_rate": jnp.ones(2)}, ValueError, r"learning_rate has shape \(2,\)"),
        ({"learning_rate": "1e-3"}, TypeError, "learning_rate is '1e-3'"),
        ({"learning_rate": 1e-3, "b1": "0.9"}, TypeError, "b1 is '0.9'"),
    ],
)
def test_rates_that_are_no_numbers(options, error, message):
    with pytest.raises(error, match=message):
        paged_adamw8bit(**options, param_rounding="stochastic")


@pytest.mark.parametrize("value, error", [(None, TypeError), (np.ones(2, f32), ValueError)])
@pytest.mark.parametrize("name", ["learning_rate", "weight_decay"])
def test_schedules_of_something_else(name, value, error):
    params = {"w": jnp.ones((64, 64), jnp.bfloat16)}
    options = {"learning_rate": 1e-3, name: lambda count: value}
    tx = paged_adamw8bit(**options, param_rounding="stochastic")
    for update in tx.update, jax.jit(tx.update):
        with pytest.raises(error, match=f"{name}, from its schedule,"):
            update(params, tx.init(params), params)
