"""`replay=True`: the last step may be discarded and run again, and no step before it.

The oracle is the NumPy specification, whose states are values that can be kept and reused freely.
"""

import functools
import random

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import paged_optax
from helpers import (
    RAISES,
    assert_trees_equal,
    finish,
    make_tree,
    to_jax,
)
from optimizers import BY_NAME, Specification
from paged_optax import (
    Paging,
    StateRefused,
    memory_report,
    moments,
    paged_adam8bit,
    paged_adamw8bit,
    release,
    scale_by_paged_adam8bit,
)

pytestmark = pytest.mark.fast

SHAPES = {"b": (7,), "w": (64, 80)}  # float32 moments, 8-bit moments


def make_grads(step):
    return to_jax(make_tree(step, SHAPES))


@pytest.fixture
def tx(device):
    del device
    return scale_by_paged_adam8bit(replay=True)


def assert_refused(call):
    with pytest.raises(StateRefused, match="not the newest one"):
        finish(call())


@pytest.mark.parametrize("seed", range(5))
def test_random_walk(tx, seed):
    """Steps from any state ever seen: from the last two it runs, from others it is refused."""
    chance = random.Random(seed)
    update = jax.jit(tx.update)
    states = [(tx.init(make_grads(0)), Specification.fresh(BY_NAME["adam"], make_grads(0)))]
    source, newest, refusals = 0, 0, 0  # the state that the last step started from, and its result
    for _ in range(40):
        near = chance.random() < 0.7
        index = chance.choice([source, newest]) if near else chance.randrange(len(states))
        state, specification = states[index]
        grads = make_grads(chance.randrange(1000))
        if index in (source, newest) or index == 0:  # a fresh state may always start again
            updates, state = update(grads, state)
            expected, specification = specification.update(grads)
            assert_trees_equal(jax.tree.map(np.asarray, updates), expected)
            states.append((state, specification))
            source, newest = index, len(states) - 1
        else:
            refusals += 1
            assert_refused(functools.partial(update, grads, state))
    assert refusals > 0
    release(states[0][0])


def test_last_step_runs_again_any_number_of_times(tx):
    state = tx.init(make_grads(0))
    for step in range(4):
        results = [tx.update(make_grads(step), state) for _ in range(3)]
        assert_trees_equal(results[0][0], results[1][0])
        assert_trees_equal(results[0][0], results[2][0])
        state = results[2][1]
    release(state)


def test_both_states_can_be_read(tx):
    state = tx.init(make_grads(0))
    _, old = tx.update(make_grads(0), state)
    before = moments(old)
    _, new = tx.update(make_grads(1), old)
    assert_trees_equal(moments(old), before)
    assert np.any(moments(new).mu["w"] != before.mu["w"])
    _, newer = tx.update(make_grads(2), new)
    with pytest.raises(RuntimeError, match="no step before it"):
        moments(old)
    release(newer)


def test_new_life_ends_the_one_before(tx):
    fresh = tx.init(make_grads(0))
    _, one = tx.update(make_grads(0), fresh)
    _, two = tx.update(make_grads(1), one)
    jax.block_until_ready(tx.update(make_grads(2), fresh))
    for state in (one, two):
        with pytest.raises(RuntimeError, match="not the newest one"):
            moments(state)
    release(fresh)


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_steps_with_bad_gradients_are_skipped_by_where(device, transform):
    """The pattern of Flax's DynamicScale: everything of the step is computed, then selected."""
    del device
    tx = paged_adamw8bit(1e-2, replay=True)

    @transform
    def step(params, state, grads):
        finite = jnp.all(jnp.array([jnp.all(jnp.isfinite(g)) for g in jax.tree.leaves(grads)]))
        updates, new_state = tx.update(grads, state, params)
        new = (optax.apply_updates(params, updates), new_state)
        return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, (params, state))

    def train(bad_steps):
        params = make_grads(100)
        state = tx.init(params)
        for i in range(8):
            if i in bad_steps:
                grads = jax.tree.map(lambda g: g.at[0].set(jnp.nan), make_grads(50 + i))
                params, state = step(params, state, grads)
                params, state = step(params, state, grads)
            params, state = step(params, state, make_grads(i))
        result = params, moments(state)
        release(state)
        return result

    assert_trees_equal(train(bad_steps=[0, 1, 4, 7]), train(bad_steps=[]))


@pytest.mark.parametrize("every_k", [1, 2, 3])
def test_optax_multi_steps(device, every_k):
    """Against the same optimizer fed with the mean gradients."""
    del device
    params = make_grads(100)
    with jax.numpy_dtype_promotion("standard"):  # optax.MultiSteps needs it
        tx = optax.MultiSteps(paged_adamw8bit(1e-2, replay=True), every_k)
        accumulated, state = params, tx.init(params)
        update = jax.jit(tx.update)
        for i in range(4 * every_k):
            updates, state = update(make_grads(i), state, accumulated)
            accumulated = optax.apply_updates(accumulated, updates)

    tx = paged_adamw8bit(1e-2)
    averaged, inner = params, tx.init(params)
    for i in range(4):
        grads = [make_grads(i * every_k + j) for j in range(every_k)]
        updates, inner = tx.update(
            jax.tree.map(lambda *g: sum(g) / every_k, *grads), inner, averaged
        )
        averaged = optax.apply_updates(averaged, updates)
    # The two means round differently, and a code may then fall on the other side of a boundary.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-3), accumulated, averaged
    )
    for held in (state, inner):
        release(held)


def test_memory_is_doubled_and_reported(tx):
    plain = scale_by_paged_adam8bit()
    _, single = plain.update(make_grads(0), plain.init(make_grads(0)))
    _, double = tx.update(make_grads(0), tx.init(make_grads(0)))
    one, two = memory_report(single), memory_report(double)
    assert two.total == 2 * one.total
    assert two.replay == one.total
    assert one.replay == 0
    assert "replay" in str(two) and "replay" not in str(one)
    assert release(double) == two.total
    release(single)


@pytest.mark.parametrize("made_with", [False, True])
def test_option_cannot_change_within_a_run(made_with):
    with jax.default_device(jax.devices("cpu")[0]):
        tx, other = (
            scale_by_paged_adam8bit(replay=replay) for replay in (made_with, not made_with)
        )
        _, state = tx.update(make_grads(0), tx.init(make_grads(0)))
        before = moments(state)
        text = f"made with replay={made_with} and this step has replay={not made_with}"
        with pytest.raises(RAISES, match=text):
            finish(other.update(make_grads(1), state))
        assert_trees_equal(moments(state), before)
        release(state)


@pytest.mark.parametrize("factory", [scale_by_paged_adam8bit, paged_adam8bit, paged_adamw8bit])
def test_replay_is_static_under_inject_hyperparams(device, factory):
    del device
    rate = {} if factory is scale_by_paged_adam8bit else {"learning_rate": 1e-2}
    with jax.numpy_dtype_promotion("standard"):
        tx = optax.inject_hyperparams(factory)(**rate, replay=True)
        params = make_grads(0)
        state = tx.init(params)
        assert "replay" not in state.hyperparams
        update = jax.jit(tx.update)
        _, first = update(make_grads(1), state, params)
        again = [update(make_grads(2), first, params)[0] for _ in range(2)]
    assert_trees_equal(*again)
    release(state)


@pytest.mark.gpu
def test_placement_changes_no_bit():
    def train(device_bytes):
        tx = paged_optax.scale_by_paged_adam8bit(
            replay=True, paging=Paging(device_bytes=device_bytes)
        )
        state = tx.init(make_grads(0))
        for i in range(6):
            tx.update(make_grads(90 + i), state)
            updates, state = tx.update(make_grads(i), state)
        result = updates, moments(state)
        assert memory_report(state).resident == (0 if device_bytes == 0 else release(state))
        release(state)
        return result

    assert_trees_equal(train(None), train(0))


def test_moments_of_a_state_whose_first_step_was_dropped(tx, device):
    """It has been used and is as new: no moments yet, and the step can be taken again."""
    start = jax.device_put(tx.init(make_grads(0)), device)
    grads = jax.device_put(make_grads(0), device)
    expected, _ = tx.update(grads, start)
    with pytest.raises(RuntimeError, match="never updated"):
        moments(start)
    actual, state = tx.update(grads, start)
    assert_trees_equal(actual, expected)
    assert moments(state).mu["w"].any()
