"""`check_last`: it accepts what leaves updates alone, refuses what changes them, and says why."""

import concurrent.futures
import threading

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

import paged_optax
from helpers import num_arenas
from paged_optax import check_last, paged_adamw8bit

f32 = np.float32
PARAMS = {"w": np.ones((64, 80), ml_dtypes.bfloat16), "b": np.ones(40, f32)}


def make(**options):
    return paged_adamw8bit(1e-5, param_rounding="compensated", **options)


HARMLESS = {
    "alone": make,
    "last of a chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), make()),
    "masked": lambda: optax.masked(make(), {"w": True, "b": False}),
    "partition": lambda: optax.partition({"a": make(), "b": optax.sgd(0.1)}, {"w": "a", "b": "b"}),
    "MultiSteps": lambda: paged_optax.MultiSteps(make(), 4).gradient_transformation(),
    "optax.MultiSteps": lambda: optax.MultiSteps(make(replay=True), 4).gradient_transformation(),
    "apply_if_finite": lambda: optax.apply_if_finite(make(replay=True), 3),
    "inject_hyperparams": lambda: optax.inject_hyperparams(
        paged_adamw8bit, hyperparam_dtype=jnp.float32
    )(1e-5, param_rounding="stochastic"),
    "a clip that does nothing": lambda: optax.chain(make(), optax.clip(10.0)),
}
HARMFUL = {
    "scale": lambda: optax.chain(make(), optax.scale(0.5)),
    "doubled": lambda: optax.chain(make(), optax.scale(2.0)),
    "negated": lambda: optax.chain(make(), optax.scale(-1.0)),
    "schedule": lambda: optax.chain(make(), optax.scale_by_schedule(lambda count: 0.9)),
    "clip": lambda: optax.chain(make(), optax.clip(1e-6)),
    "ema": lambda: optax.chain(make(), optax.ema(0.5)),
    "decay": lambda: optax.chain(make(), optax.add_decayed_weights(0.1)),
    "frozen": lambda: optax.chain(
        make(), optax.masked(optax.set_to_zero(), {"w": True, "b": False})
    ),
    "apply_every": lambda: optax.chain(make(), optax.apply_every(3)),
}


@pytest.mark.parametrize("factory", HARMLESS.values(), ids=HARMLESS)
def test_check_last_accepts(factory):
    before = num_arenas()
    with jax.numpy_dtype_promotion("standard"):
        check_last(factory(), PARAMS)
    assert num_arenas() == before
    np.testing.assert_array_equal(PARAMS["b"], 1)


@pytest.mark.parametrize("factory", HARMFUL.values(), ids=HARMFUL)
def test_check_last_refuses(factory):
    before = num_arenas()
    with (
        jax.numpy_dtype_promotion("standard"),
        pytest.raises(ValueError, match="something after the paged optimizer changes its updates"),
    ):
        check_last(factory(), PARAMS)
    assert num_arenas() == before


@jax.numpy_dtype_promotion("standard")
def test_check_last_passes_arguments_on():
    """`contrib.reduce_on_plateau` needs the loss; after the optimizer it scales updates."""
    plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=1)
    adamw = paged_adamw8bit(1e-3, param_rounding="compensated")
    check_last(optax.chain(plateau, adamw), PARAMS, value=1.0)
    with pytest.raises(TypeError, match="value"):
        check_last(optax.chain(plateau, adamw), PARAMS)
    with pytest.raises(ValueError, match="after the paged optimizer"):
        check_last(optax.chain(adamw, plateau), PARAMS, value=1.0)


@pytest.mark.fast
def test_check_last_takes_shapes():
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), PARAMS)
    check_last(make(), shapes)


def test_check_last_where_nothing_is_rounded():
    with pytest.raises(ValueError, match="Is param_rounding 'nearest'"):
        check_last(paged_adamw8bit(1e-3), PARAMS, max_steps=2)


@pytest.mark.fast
def test_check_last_without_a_paged_optimizer():
    with pytest.raises(ValueError, match="there is no paged optimizer in tx"):
        check_last(optax.adam(1e-3), PARAMS)


def test_check_last_of_a_long_cycle():
    tx = paged_optax.MultiSteps(make(), 100).gradient_transformation()
    with pytest.raises(ValueError, match="within 64 steps .* larger max_steps"):
        check_last(tx, PARAMS)
    check_last(tx, PARAMS, max_steps=100)


@pytest.mark.parametrize("warm", [False, True])
def test_check_last_of_a_jitted_update_leaves_nothing_behind(warm):
    adamw = paged_adamw8bit(1e-3, param_rounding="compensated")
    tx = optax.GradientTransformation(adamw.init, jax.jit(adamw.update))
    params = {"w": jnp.ones((64, 64), jnp.bfloat16)}
    if warm:
        tx.update(params, tx.init(params), params)
    check_last(tx, params)
    assert "callback" not in tx.update.lower(params, tx.init(params), params).as_text()


def test_check_last_names_nan_as_what_it_is():
    tx = optax.inject_hyperparams(paged_adamw8bit)(learning_rate=1e-3, param_rounding="compensated")
    with pytest.raises(ValueError, match="are NaN.*hyperparam_dtype"):
        check_last(tx, {"w": jnp.ones((64, 64), jnp.bfloat16)})


def test_checks_of_two_threads():
    """Neither sees the other's updates, nor gets into what it traces meanwhile."""
    begun, go_on = threading.Event(), threading.Event()

    def wait(updates, state, params=None):
        begun.set()
        assert go_on.wait(600)
        return updates, state

    pause = optax.GradientTransformation(lambda params: optax.EmptyState(), wait)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        check = pool.submit(check_last, optax.chain(pause, make()), PARAMS)
        assert begun.wait(600)
        check_last(make(), PARAMS)
        with pytest.raises(ValueError, match="after the paged optimizer"):
            check_last(optax.chain(make(), optax.scale(0.5)), PARAMS)
        tx = make()
        grads = jax.tree.map(jnp.asarray, PARAMS)
        program = jax.jit(tx.update).lower(grads, tx.init(grads), grads)
        assert "callback" not in program.as_text()
        go_on.set()
        check.result()


def test_check_inside_of_another():
    """And a step of an optimizer that has nothing to do with the one that is checked."""
    other = make()

    def meanwhile(updates, state, params=None):
        check_last(make(), PARAMS)
        other.update(updates, other.init(params), params)
        return updates, state

    tx = optax.GradientTransformation(lambda params: optax.EmptyState(), meanwhile)
    check_last(optax.chain(tx, make()), PARAMS)
    with pytest.raises(ValueError, match="after the paged optimizer"):
        check_last(optax.chain(tx, make(), optax.scale(0.5)), PARAMS)
