"""What only a GPU shows: managed memory, asynchronous steps.

What a refused step does is in test_refused.py.

Managed allocations stay far below what the card has free; pressure is made with budgets.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import paged_optax
from helpers import free_device_bytes, hooks, num_arenas, raise_if_refused
from paged_optax import Paging, StateRefused, memory_report, moments, paged_adamw8bit, release

pytestmark = pytest.mark.gpu


def tree(seed=0):
    """Leaves of every kind: large, partial blocks, small, all dtypes, empty."""
    rng = np.random.default_rng(seed)

    def leaf(shape, dtype):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    return {
        "f32": leaf((1000, 333), jnp.float32),
        "bf16": leaf((512, 512), jnp.bfloat16),
        "f16": leaf((5000,), jnp.float16),
        "bias": leaf((77,), jnp.float32),
        "scalar": leaf((), jnp.float32),
        "empty": leaf((0, 3), jnp.float32),
    }


def run(paging, num_steps=20):
    tx = paged_adamw8bit(1e-2, paging=paging)
    params = tree()
    state = tx.init(params)

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for i in range(num_steps):
        params, state = step(params, state, tree(i + 1))
    return params, state


def wait(x):
    jax.block_until_ready(x)


@pytest.fixture
def stepped():
    """A transformation, its parameters and a state after two updates."""
    tx = paged_optax.scale_by_paged_adam8bit()
    params = {"w": jnp.ones((64, 64)), "b": jnp.ones(5)}
    state = tx.init(params)
    states = [state]
    for _ in range(2):
        _, state = tx.update(params, state)
        states.append(state)
    wait(states)
    yield tx, params, states
    for state in states:
        release(state)


def test_placement_changes_no_bit():
    resident, resident_state = run(Paging())
    hosted, hosted_state = run(Paging(device_bytes=0))
    assert memory_report(resident_state).on_host == 0
    assert memory_report(hosted_state).resident == 0
    for a, b in zip(jax.tree.leaves(resident), jax.tree.leaves(hosted), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    for a, b in zip(
        jax.tree.leaves(moments(resident_state)),
        jax.tree.leaves(moments(hosted_state)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    release(resident_state), release(hosted_state)


def test_budget_counts_all_states():
    _, first = run(Paging(device_bytes=3 * 2**20), num_steps=1)
    _, second = run(Paging(device_bytes=3 * 2**20), num_steps=1)
    assert memory_report(first).on_host == 0
    assert memory_report(second).resident == 0
    release(first), release(second)


def test_xla_allocator_holds_no_moments():
    device = jax.devices("gpu")[0]
    params = jnp.zeros((64, 1024, 1024), jnp.bfloat16)
    tx = paged_adamw8bit(1e-3)
    state = tx.init(params)
    wait((params, state))
    before = device.memory_stats()["bytes_in_use"]
    updates, state = tx.update(params, state, params)
    del updates
    wait(state)
    assert device.memory_stats()["bytes_in_use"] - before < 1 << 20
    assert memory_report(state).total >= 2 * params.size
    release(state)


def test_release_returns_device_memory():
    params = jnp.zeros((256, 1024, 1024), jnp.bfloat16)
    tx = paged_optax.scale_by_paged_adam8bit()
    _, state = tx.update(params, tx.init(params))
    wait(state)
    free = free_device_bytes(0)
    nbytes = release(state)
    assert nbytes >= 2 * params.size
    assert free_device_bytes(0) - free >= 0.9 * nbytes


OPTIONS = {
    "default": {},
    "compensated": {"param_rounding": "compensated"},
    "skip_step": {"non_finite": "skip_step", "param_rounding": "stochastic"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_step_returns_before_the_device_is_free(options):
    """Also a step whose gradients turn out not to be finite, and which is skipped."""

    @jax.jit
    def busy(x):
        for _ in range(60):
            x = (x @ x) * jnp.bfloat16(5e-3)  # goes to 0
        return 1 + x[0, 0].astype(jnp.float32)

    tx = paged_adamw8bit(1e-3, **options)
    params = {"w": jnp.ones((1024, 1024), jnp.bfloat16), "b": jnp.ones(10)}
    state = tx.init(params)

    @jax.jit
    def step(params, state, scale):
        grads = jax.tree.map(lambda p: p * scale.astype(p.dtype), params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    x = jnp.full((16384, 16384), 1e-2, jnp.bfloat16)
    y = busy(x)
    for _ in range(3):  # compiles all that follows
        params, state = step(params, state, y * jnp.float32(1))
    wait((params, state))

    scale = jnp.float32(jnp.nan if "non_finite" in options else 1)
    was_busy = []
    while not any(was_busy) and len(was_busy) < 3:  # this thread may stand still for that long
        y = busy(x)
        params, state = step(params, state, y * scale)
        was_busy.append(not y.is_ready())
        wait((params, state))
    assert was_busy[-1]
    if "non_finite" in options:
        assert state.skipped == len(was_busy) and state.inner_state[0].count == 3
    release(state)


def from_elsewhere(state, version):
    """The state as another process would have left it."""
    handle = int(state.token.value[0])
    handle += 2**25 if handle < 2**29 else -(2**25)
    return state._replace(token=type(state.token)(jnp.array([handle, version], jnp.int32)))


def test_missing_moments_start_over_on_the_device():
    """At zero, with bias correction from there; the count goes on, and so does everything else."""
    tx = paged_optax.scale_by_paged_adam8bit(missing="restart")
    params = {"w": jnp.full((64, 64), 0.5), "b": jnp.full(5, 0.25)}
    step = jax.jit(tx.update)
    state = from_elsewhere(tx.init(params)._replace(count=jnp.int32(100)), 57)
    raise_if_refused()
    with pytest.warns(RuntimeWarning, match=r"start at zero on cuda:0"):
        _, state = step(params, state)
        jax.block_until_ready(state)
        memory_report(state)
    fresh = tx.init(params)
    _, fresh = step(params, fresh)
    for i in range(3):
        grads = jax.tree.map(lambda p: p * (i + 2.0), params)  # noqa: B023
        expected, fresh = step(grads, fresh)
        actual, state = step(grads, state)
        for name in params:
            np.testing.assert_array_equal(np.asarray(actual[name]), np.asarray(expected[name]))
    assert int(state.count) == 104 and int(state.token.value[1]) == 61
    for name in params:
        np.testing.assert_array_equal(moments(state).mu[name], moments(fresh).mu[name])
        np.testing.assert_array_equal(moments(state).nu[name], moments(fresh).nu[name])
    release(state)
    release(fresh)


def test_state_that_another_process_never_updated():
    tx = paged_optax.scale_by_paged_lion8bit()
    params = {"w": jnp.full((48, 96), 0.5)}  # no other state here has such a leaf
    state = from_elsewhere(tx.init(params), 0)
    _, state = tx.update(params, state)
    _, state = tx.update(params, state)
    np.testing.assert_allclose(moments(state).mu["w"], 0.5 * (1 - 0.99**2), rtol=0.02)
    release(state)


def test_fresh_state_starts_anew(stepped):
    tx, params, (fresh, _, newest) = stepped
    first, state = tx.update(params, fresh)
    np.testing.assert_allclose(np.asarray(first["w"]), 1.0, rtol=1e-5)
    with pytest.raises(StateRefused, match="not the newest one"):
        tx.update(params, newest)
    assert memory_report(state).total > 0


def test_many_leaves():
    params = [jnp.full((n,), 0.5) for n in range(1, 400)]
    params += [jnp.full((4096, 2), 0.5, jnp.bfloat16) for _ in range(400)]
    tx = paged_optax.scale_by_paged_adam8bit()
    updates, state = jax.jit(tx.update)(params, tx.init(params))
    for update in updates:
        np.testing.assert_allclose(np.asarray(update, np.float32), 1.0, rtol=1e-2)
    release(state)


def test_many_states():
    """The table of arenas on the device grows, and shrinks again."""
    tx = paged_optax.scale_by_paged_adam8bit()
    params = jnp.ones(300)
    arenas = num_arenas()
    states = [tx.update(params * (i + 1), tx.init(params))[1] for i in range(150)]
    assert num_arenas() == arenas + 150
    for i in (0, 77, 149):
        np.testing.assert_allclose(moments(states[i]).mu[0], 0.1 * (i + 1), rtol=1e-5)
    for state in states:
        release(state)
    assert num_arenas() == arenas


def test_fast_math_is_exact_where_it_says_so():
    """All 2^32 arguments of the GPU's own square root and reciprocal."""
    assert hooks.count_inexact(0) == 0
