"""`MultiSteps`: the numbers of `optax.MultiSteps`, and one inner update a cycle."""

import functools
import logging

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from helpers import (
    RAISES,
    assert_close_ulps,
    assert_trees_close,
    assert_trees_equal,
    finish,
    is_zero,
    make_tree,
    stored_leaves,
    to_jax,
)
from paged_optax import (
    MultiSteps,
    Quantization,
    memory_report,
    moments,
    paged_adamw8bit,
    release,
    scale_by_paged_adam8bit,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("device", "standard_promotion")]


def make_params(seed=0, dtype=jnp.float32):
    return to_jax(make_tree(seed, {"bias": (80,), "kernel": (64, 80)}, dtype))


def make_grads(step, dtype=jnp.float32):
    return make_params(1000 + step, dtype)


def make_integers(step):
    """Gradients whose sums and means of two are exact, in any order of operations."""
    rng = np.random.default_rng(step)
    shapes = {"bias": (80,), "kernel": (64, 80)}
    return {k: jnp.asarray(rng.integers(-8, 9, s), jnp.float32) for k, s in shapes.items()}


def run(tx, num_steps, update=None, dtype=jnp.float32, make=make_grads):
    """Parameters, and what each micro-step returned."""
    update = jax.jit(tx.update) if update is None else update
    params = make_params(dtype=dtype)
    state = tx.init(params)
    history = []
    for i in range(num_steps):
        updates, state = update(make(i, dtype), state, params)
        params = optax.apply_updates(params, updates)
        history.append((updates, state))
    return params, history


def assert_same_types(actual, desired):
    assert jax.tree.structure(actual) == jax.tree.structure(desired)
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(desired), strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)


def assert_like_optax(ours, theirs, **tolerances):
    """Everything that two runs return, but for accumulators that optax has reset."""
    assert_same_types(ours, theirs)
    (params, ours), (expected_params, theirs) = ours, theirs
    assert_trees_close(params, expected_params, **tolerances)
    for (updates, state), (expected_updates, expected) in zip(ours, theirs, strict=True):
        if expected.mini_step == 0:
            assert is_zero(expected.acc_grads)
            state = state._replace(acc_grads=expected.acc_grads)
        else:
            assert is_zero(updates)
        assert_trees_close(updates, expected_updates, **tolerances)
        assert_trees_close(state, expected, **tolerances)


# --- The numbers of optax.MultiSteps -------------------------------------------------------------

CONFIGS = {
    "3": {"every_k_schedule": 3},
    "1": {"every_k_schedule": 1},
    "sum": {"every_k_schedule": 3, "use_grad_mean": False},
    "schedule": {"every_k_schedule": lambda step: jnp.where(step < 2, 1, 3)},
    "schedule of ints": {"every_k_schedule": lambda step: 2},
    "shrinking schedule": {"every_k_schedule": lambda step: 4 - jnp.minimum(step, 3)},
    "skip_not_finite": {"every_k_schedule": 3, "should_skip_update_fn": optax.skip_not_finite},
    "skip_large_updates": {
        "every_k_schedule": 3,
        "should_skip_update_fn": functools.partial(
            optax.skip_large_updates,
            max_squared_norm=5200.0,  # of these gradients, about half have less
        ),
    },
    "bfloat16 accumulators": {"every_k_schedule": 3, "accumulator_dtype": jnp.bfloat16},
}


EAGER = ["3", "schedule", "skip_not_finite"]  # each compiles a program at every operation


@pytest.mark.parametrize(
    "name, transform",
    [(name, jax.jit) for name in CONFIGS] + [(name, lambda f: f) for name in EAGER],
    ids=[*CONFIGS, *(f"{name}, eager" for name in EAGER)],
)
def test_numbers(name, transform):
    config = CONFIGS[name]
    ours, theirs = (
        factory(optax.adamw(1e-2, weight_decay=0.1), **config)
        for factory in (MultiSteps, optax.MultiSteps)
    )
    results = run(ours, 12, transform(ours.update))
    # A sum of three gradients of 16 bits is rounded three times, its mean as often.
    coarse = {"atol": 1e-2, "ulps": 2 * 6, "term": 4.0, "term_ulps": 2 * 6}
    coarse = coarse if "accumulator_dtype" in config else {}
    assert_like_optax(results, run(theirs, 12), **coarse)
    _, history = results
    assert history[-1][1].gradient_step >= 2


def test_skip_large_updates_skips_some():
    tx = MultiSteps(optax.sgd(1.0), **CONFIGS["skip_large_updates"])
    _, history = run(tx, 12)
    assert 3 <= sum(bool(state.skip_state["should_skip"]) for _, state in history) <= 9


def test_numbers_in_bfloat16():
    """bfloat16 gradients, float32 accumulators, bfloat16 updates."""
    results = [
        run(factory(optax.adamw(1e-2), 3), 12, dtype=jnp.bfloat16)
        for factory in (MultiSteps, optax.MultiSteps)
    ]
    # In each of four steps a moment is rounded thrice and an update ten times. No update is larger
    # than 0.04.
    assert_like_optax(*results, ulps=2 * 3 * 4 + 2 * 10)
    assert_close_ulps(results[0][0], results[1][0], ulps=4, term=0.04, term_ulps=2 * 10 * 4)
    updates, state = results[0][1][-1]
    assert updates["kernel"].dtype == jnp.bfloat16
    assert state.acc_grads["kernel"].dtype == jnp.float32


OPTIMIZERS = {
    "clip, adamw": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2)),
    "momentum": lambda: optax.sgd(1e-2, momentum=0.9),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adam)(
        learning_rate=optax.linear_schedule(1e-2, 1e-3, 3)
    ),
    "masked": lambda: optax.masked(optax.adam(1e-2), {"bias": True, "kernel": False}),
    "partition": lambda: optax.partition(
        {"a": optax.adam(1e-2), "b": optax.sgd(1e-2)}, {"bias": "a", "kernel": "b"}
    ),
    "random numbers": lambda: optax.add_noise(0.1, 0.5, key=0),
    "schedule_free": lambda: optax.contrib.schedule_free_adamw(1e-2),
    "bfloat16 moments": lambda: optax.adamw(1e-2, mu_dtype=jnp.bfloat16),
    "nothing": optax.identity,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer(name):
    results = [run(factory(OPTIMIZERS[name](), 2), 6) for factory in (MultiSteps, optax.MultiSteps)]
    # A first moment of 16 bits is rounded thrice in each of three steps, by 2^-9 of itself, and so
    # are updates of at most 0.02.
    halves = {"ulps": 2 * 3 * 3, "atol": 3 * 0.02 * (2 * 3 * 3) * 2.0**-9}
    assert_like_optax(*results, **(halves if name == "bfloat16 moments" else {}))


def test_state_of_optax_goes_on_here():
    theirs, ours = (cls(optax.adamw(1e-2), 3) for cls in (optax.MultiSteps, MultiSteps))
    params, history = run(theirs, 9)
    for done in (3, 4, 5):  # at the start of a cycle and within it
        _, state = history[done - 1]
        for i in range(done, 9):
            _, state = ours.update(make_grads(i), state, params)
        assert state.gradient_step == 3
        expected = history[-1][1].inner_opt_state
        assert_trees_close(state.inner_opt_state[0], expected[0])


# --- One inner update a cycle --------------------------------------------------------------------


def counting(runs):
    """An optimizer that notes each run of its update."""

    def update(updates, state, params=None):
        jax.debug.callback(lambda: runs.append(1))
        return updates, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


@pytest.mark.parametrize("how", ["eager", "jit", "scan"])
def test_inner_update_runs_once_a_cycle(how):
    runs = []
    tx = MultiSteps(counting(runs), 4)
    if how == "scan":
        grads = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[make_grads(i) for i in range(12)])
        step = lambda state, grads: tx.update(grads, state)[::-1]  # noqa: E731
        jax.block_until_ready(jax.lax.scan(step, tx.init(make_params()), grads))
    else:
        run(tx, 12, jax.jit(tx.update) if how == "jit" else tx.update)
    jax.effects_barrier()
    assert len(runs) == 3


@pytest.mark.fast
@pytest.mark.parametrize("use_grad_mean", [False, True], ids=["sum", "mean"])
def test_paged_state_changes_once_a_cycle(use_grad_mean):
    """Bit for bit the bare optimizer, given the sums (or means) of the gradients."""
    num_cycles, k = (4, 2) if use_grad_mean else (3, 5)
    bare = scale_by_paged_adam8bit()
    tx = MultiSteps(bare, k, use_grad_mean)
    update, bare_update = jax.jit(tx.update, donate_argnums=1), jax.jit(bare.update)
    params = make_params()
    state, bare_state = tx.init(params), bare.init(params)
    handle = state.inner_opt_state.token.value[0]
    for cycle in range(num_cycles):
        grads = [make_integers(cycle * k + i) for i in range(k)]
        for i in range(k):
            assert state.inner_opt_state.token.value.tolist() == [handle, cycle]
            updates, state = update(grads[i], state)
            assert is_zero(updates) == (i < k - 1)
        total = jax.tree.map(lambda *leaves: sum(leaves) / (k if use_grad_mean else 1), *grads)
        expected, bare_state = bare_update(total, bare_state)
        assert_trees_equal(updates, expected)
        assert_trees_equal(stored_leaves(state.inner_opt_state), stored_leaves(bare_state))
        assert tx.has_updated(state)
    assert state.inner_opt_state.count == state.gradient_step == num_cycles
    assert state.inner_opt_state.token.value.tolist() == [handle, num_cycles]


def test_paged_state_in_a_scan_that_stacks_updates():
    """XLA:GPU copies slices into calls, and a call may not run twice."""
    params = make_params()
    tx = MultiSteps(paged_adamw8bit(1e-2), 2)
    grads = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[make_integers(i) for i in range(6)])

    @jax.jit
    def loop(state, grads):
        return jax.lax.scan(lambda s, g: tx.update(g, s, params)[::-1], state, grads)

    state, stacked = loop(tx.init(params), grads)
    assert state.inner_opt_state[0].token.value[1] == 3
    one_by_one = tx.init(params)
    for i in range(6):
        updates, one_by_one = tx.update(make_integers(i), one_by_one, params)
        assert_trees_close(jax.tree.map(lambda leaf, i=i: leaf[i], stacked), updates)
    assert_trees_equal(moments(state), moments(one_by_one))


def test_schedules_inside_count_cycles():
    rates = jnp.array([0.5, 0.25, 0.125])
    tx = MultiSteps(optax.sgd(lambda count: rates[count]), 2)
    _, history = run(tx, 6, make=lambda i, dtype: {k: jnp.ones_like(v) for k, v in PARAMS.items()})
    assert [float(updates["bias"][0]) for updates, _ in history] == [0, -0.5, 0, -0.25, 0, -0.125]


PARAMS = {"bias": np.zeros(80, np.float32), "kernel": np.zeros((64, 80), np.float32)}


def test_nothing_is_compiled_twice():
    tx = MultiSteps(optax.adamw(1e-2), lambda step: jnp.where(step < 2, 1, 3))
    update = jax.jit(tx.update, donate_argnums=(0, 1))
    run(tx, 8, update)
    assert update._cache_size() == 1


def test_eager_steps_compile_no_branch(caplog):
    tx = MultiSteps(optax.adamw(1e-2), 2)
    _, history = run(tx, 4, tx.update)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        params, state = make_params(), history[-1][1]
        for i in range(4):
            _, state = tx.update(make_grads(i), state, params)
    assert not [r for r in caplog.records if "Compiling" in r.getMessage()]


@pytest.mark.parametrize("make", [optax.adamw, paged_adamw8bit])
def test_accumulators_and_state_change_in_place(make):
    """The compiled step needs room for the updates, and for no copy of anything that large."""
    if jax.config.jax_default_device.platform != "cpu":
        pytest.skip("how XLA:CPU places buffers")
    params = {"w": jnp.ones((512, 512))}
    tx = MultiSteps(make(1e-2), 4)
    update = jax.jit(tx.update, donate_argnums=(0, 1))
    compiled = update.lower(params, tx.init(params), params).compile()
    memory = compiled.memory_analysis()
    spare = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    assert spare < 1.1 * params["w"].nbytes


# --- Loops, wrappers and Flax --------------------------------------------------------------------


def test_chain_passes_extra_arguments_on():
    seen = []

    def update(updates, state, params=None, *, value, scale):
        seen.append(scale)  # not an array: it gets through as it is
        return jax.tree.map(lambda g: g * value, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    tx = optax.chain(optax.scale(2.0), MultiSteps(inner, 2).gradient_transformation())
    step = jax.jit(lambda g, s, value: tx.update(g, s, None, value=value, scale="large"))
    ones = jax.tree.map(jnp.ones_like, PARAMS)
    state = tx.init(PARAMS)
    for value, expected in ((3.0, 0.0), (5.0, 10.0)):
        updates, state = step(ones, state, value)
        np.testing.assert_array_equal(updates["bias"], expected)
    assert set(seen) == {"large"}
    tx = MultiSteps(optax.sgd(1.0), 2)  # which knows no extra arguments
    tx.update(ones, tx.init(ones), value=1.0)


def test_line_search_inside():
    """It is given functions, and evaluates them within the branch."""

    def loss(params):
        return sum(jnp.sum((leaf - 1.0) ** 2) for leaf in jax.tree.leaves(params))

    results = []
    for factory in (MultiSteps, optax.MultiSteps):
        search = optax.scale_by_backtracking_linesearch(max_backtracking_steps=5)
        tx = factory(optax.chain(optax.sgd(1.0), search), 2)

        @jax.jit
        def step(params, state, tx=tx):
            value, grad = jax.value_and_grad(loss)(params)
            updates, state = tx.update(grad, state, params, value=value, grad=grad, value_fn=loss)
            return optax.apply_updates(params, updates), state

        params = make_params()
        state = tx.init(params)
        for _ in range(4):
            params, state = step(params, state)
        results.append(params)
    assert_trees_close(*results)
    assert loss(results[0]) < loss(make_params()) / 2


def test_chain_of_clipping_and_paged_adamw():
    inner = functools.partial(paged_adamw8bit, 1e-2)
    accumulate = MultiSteps(inner(), 1).gradient_transformation()
    clip = optax.clip_by_global_norm(1.0)
    params, _ = run(optax.chain(clip, accumulate), 4)
    expected, _ = run(optax.chain(clip, inner()), 4)
    assert_trees_close(params, expected)


def test_without_parameters():
    tx = MultiSteps(scale_by_paged_adam8bit(), 2)
    state = tx.init(make_params())
    for i in range(2):
        updates, state = jax.jit(tx.update)(make_grads(i), state)
    assert not is_zero(updates)


def test_init_makes_nothing_but_the_state(monkeypatch):
    """Without a function that wants to see gradients, none are made."""
    made = []
    zeros_like = jnp.zeros_like

    def count(*args, **kwargs):
        made.append(args)
        return zeros_like(*args, **kwargs)

    monkeypatch.setattr(jnp, "zeros_like", count)
    tx = MultiSteps(optax.identity(), 2)
    state = tx.init(PARAMS)
    assert len(made) == len(jax.tree.leaves(state.acc_grads)) > 0


def test_inner_opt():
    inner = paged_adamw8bit(1e-2)
    assert MultiSteps(inner, 2).inner_opt is inner
    assert MultiSteps(optax.identity(), 2).inner_opt.update({}, (), None, extra=1) == ({}, ())


def test_moments_are_found():
    tx = MultiSteps(paged_adamw8bit(1e-2), 2)
    _, history = run(tx, 3)
    _, state = history[-1]
    assert moments(state).mu["kernel"].shape == (64, 80)
    assert memory_report(state).total == release(state) > 2 * 64 * 80


def loss_of(apply):
    x = jax.random.normal(jax.random.key(1), (16, 64))
    return jnp.mean((apply(x) - jnp.sin(x)) ** 2)


def test_nnx_optimizer():
    def train(factory, inner):
        model = nnx.Linear(64, 64, rngs=nnx.Rngs(0))
        tx = factory(inner(1e-2), 3)
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer):
            loss, grads = nnx.value_and_grad(loss_of)(model)
            optimizer.update(model, grads)
            return loss

        return [step(model, optimizer) for _ in range(9)], optimizer

    expected, _ = train(optax.MultiSteps, optax.adamw)
    losses, _ = train(MultiSteps, optax.adamw)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    losses, optimizer = train(MultiSteps, paged_adamw8bit)
    np.testing.assert_allclose(losses, expected, rtol=1e-2)
    assert losses[0] == losses[2] > losses[3] == losses[5] > losses[6]
    assert optimizer.opt_state.inner_opt_state[0].token.value[1] == 3
    assert bool(optimizer.tx.has_updated(optimizer.opt_state))
    assert release(optimizer) > 2 * 64 * 64


def test_linen_train_state():
    model = nn.Dense(64)
    params = model.init(jax.random.key(0), jnp.ones((1, 64)))["params"]

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state):
        loss, grads = jax.value_and_grad(
            lambda params: loss_of(lambda x: state.apply_fn({"params": params}, x))
        )(state.params)
        return state.apply_gradients(grads=grads), loss

    def train(tx):
        state = TrainState.create(
            apply_fn=model.apply, params=jax.tree.map(jnp.copy, params), tx=tx
        )
        losses = []
        for _ in range(9):
            state, loss = step(state)
            losses.append(loss)
        return state, losses

    _, expected = train(optax.MultiSteps(optax.adamw(1e-2), 3))
    state, losses = train(MultiSteps(paged_adamw8bit(1e-2), 3))
    np.testing.assert_allclose(losses, expected, rtol=1e-2)
    assert state.opt_state.inner_opt_state[0].token.value[1] == 3
    assert release(state) > 2 * 64 * 64


def test_vmap_of_another_optimizer():
    tx = MultiSteps(optax.adam(1e-2), 2)
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), make_params(0), make_params(1))
    state = jax.vmap(tx.init)(params)
    single = tx.init(make_params(1))
    for i in range(4):
        updates, state = jax.vmap(tx.update)(
            jax.tree.map(lambda g: jnp.stack([g + 1, g]), make_grads(i)), state, params
        )
        expected, single = tx.update(make_grads(i), single, make_params(1))
        assert_trees_close(jax.tree.map(lambda leaf: leaf[1], updates), expected)


# --- Gradients that are not finite, and steps that are skipped -----------------------------------


@pytest.mark.fast
def test_nan_spoils_its_own_cycle_alone():
    tx = MultiSteps(optax.sgd(1.0), 2)
    state = tx.init(PARAMS)
    seen = []
    for value in (np.nan, 1.0, 2.0, 4.0, np.inf, 1.0, 3.0, 3.0):
        grads = jax.tree.map(lambda leaf, value=value: jnp.full_like(leaf, value), PARAMS)
        updates, state = jax.jit(tx.update)(grads, state)
        seen.append(float(updates["bias"][0]))
    np.testing.assert_array_equal(seen, [0, np.nan, 0, -3, 0, np.nan, 0, -3])


def test_updates_within_a_cycle_are_zero_where_the_optimizer_gives_nan():
    tx = MultiSteps(optax.stateless(lambda g, params: jax.tree.map(jnp.log, g)), 2)
    state = tx.init(PARAMS)
    updates, state = jax.jit(tx.update)(jax.tree.map(lambda p: p - 1, PARAMS), state)
    assert is_zero(updates)


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_skipped_steps_leave_a_paged_state_alone(transform):
    """A gradient that is not finite, at each place of a cycle, counts as if it had not come."""
    inner = scale_by_paged_adam8bit()
    plain = MultiSteps(inner, 2)
    skipping = MultiSteps(inner, 2, should_skip_update_fn=optax.skip_not_finite)
    state, expected = skipping.init(PARAMS), plain.init(PARAMS)
    update = transform(skipping.update)
    for i in range(4):
        bad = {**make_integers(i), "bias": jnp.full(80, np.inf)}
        before = state._replace(skip_state=None)
        updates, state = update(bad, state)
        assert is_zero(updates)
        assert state.skip_state["should_skip"] and state.skip_state["num_not_finite"] == 80
        assert_trees_equal(state._replace(skip_state=None), before)

        updates, state = update(make_integers(i), state)
        assert not state.skip_state["should_skip"]
        wanted, expected = plain.update(make_integers(i), expected)
        assert_trees_equal(updates, wanted)
        assert state.mini_step == expected.mini_step
    assert_trees_equal(
        stored_leaves(state.inner_opt_state), stored_leaves(expected.inner_opt_state)
    )


def test_only_the_end_of_a_cycle_uses_a_paged_state_up():
    tx = MultiSteps(scale_by_paged_adam8bit(), 2)
    _, history = run(tx, 4)
    middle, newest = history[2][1], history[3][1]
    updates, _ = tx.update(make_grads(0), history[3][1])
    assert is_zero(updates)
    with pytest.raises(RAISES, match="not the newest"):
        finish(tx.update(make_grads(3), middle))
        finish(tx.update(make_grads(3), newest))  # a GPU reports the last call
        finish(moments(newest))


# --- Trees, dtypes and mistakes ------------------------------------------------------------------


def test_empty_and_masked_nodes():
    tree = {"a": None, "b": optax.MaskedNode(), "c": jnp.ones((2, 3)), "d": []}
    tx = MultiSteps(optax.sgd(1.0), 2)
    state = tx.init(tree)
    for _ in range(2):
        updates, state = tx.update(tree, state, tree)
    assert jax.tree.structure(updates) == jax.tree.structure(tree)
    np.testing.assert_array_equal(updates["c"], -1.0)


@pytest.mark.parametrize(
    "dtype, accumulator_dtype, expected",
    [
        (jnp.float32, jnp.float32, jnp.float32),
        (jnp.bfloat16, jnp.float32, jnp.float32),
        (jnp.bfloat16, None, jnp.bfloat16),
        (jnp.float32, jnp.bfloat16, jnp.bfloat16),
        (jnp.complex64, jnp.float32, jnp.complex64),
        (jnp.int32, jnp.float32, jnp.float32),
    ],
    ids=lambda dtype: getattr(dtype, "__name__", "None"),
)
def test_dtypes(dtype, accumulator_dtype, expected):
    """Accumulators keep their dtype, and the optimizer is given gradients of theirs."""

    def update(updates, state, params=None):
        assert updates["w"].dtype == dtype
        return updates, state

    inner = optax.GradientTransformation(lambda params: optax.EmptyState(), update)
    tx = MultiSteps(inner, 2, accumulator_dtype=accumulator_dtype)
    grads = {"w": jnp.full(3, 3 + (1j if dtype == jnp.complex64 else 0), dtype)}
    state = tx.init(grads)

    def step(state, _):
        return tx.update(grads, state)[::-1]

    state, updates = jax.lax.scan(step, state, length=4)  # a loop's types must not change
    assert state.acc_grads["w"].dtype == expected
    zero = np.zeros(3)
    np.testing.assert_array_equal(updates["w"], np.stack([zero, grads["w"], zero, grads["w"]]))


def test_inner_state_keeps_its_dtypes():
    """As in `optax.MultiSteps`, also where the optimizer returns others."""

    def update(updates, state, params=None):
        return updates, state + jnp.float32(1)

    inner = optax.GradientTransformation(lambda params: jnp.zeros([], jnp.bfloat16), update)
    tx = MultiSteps(inner, 2)
    state = tx.init(PARAMS)
    for _ in range(4):
        _, state = jax.jit(tx.update)(PARAMS, state)
    assert state.inner_opt_state.dtype == jnp.bfloat16 and state.inner_opt_state == 2


def test_bfloat16_gradients_are_added_in_float32():
    """In bfloat16, 256 + 1 is 256."""
    tx = MultiSteps(optax.identity(), 4, use_grad_mean=False)
    state = tx.init(jnp.zeros(1, jnp.bfloat16))
    for value in (256, 1, 1, 2):
        updates, state = tx.update(jnp.full(1, value, jnp.bfloat16), state)
    assert updates.dtype == jnp.bfloat16 and updates == 260


def test_strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        tx = MultiSteps(scale_by_paged_adam8bit(), lambda step: jnp.uint8(2))
        state = tx.init(make_params(dtype=jnp.bfloat16))
        for i in range(2):
            updates, state = jax.jit(tx.update)(make_grads(i, jnp.bfloat16), state)
    assert not is_zero(updates)


def test_cycle_that_is_too_long_ends_at_once():
    """As when a run goes on with a smaller every_k_schedule."""
    long, short = (MultiSteps(optax.sgd(1.0), k) for k in (8, 2))
    state = long.init(PARAMS)
    for i in range(5):
        _, state = long.update(make_grads(i), state)
    updates, state = short.update(make_grads(5), state)
    assert short.has_updated(state)
    mean = jax.tree.map(lambda *leaves: -sum(leaves) / 6, *[make_grads(i) for i in range(6)])
    assert_trees_close(updates, mean)


@pytest.mark.parametrize("k", [0, -2])
def test_cycles_of_nothing(k):
    with pytest.raises(ValueError, match=f"every_k_schedule is {k}; a cycle has at least 1"):
        MultiSteps(optax.sgd(1.0), k)


@pytest.mark.parametrize("k", [2.0, lambda step: jnp.ones(2, jnp.int32)], ids=["float", "array"])
def test_every_k_schedule_is_an_integer(k):
    tx = MultiSteps(optax.sgd(1.0), k)
    with pytest.raises(TypeError, match=r"every_k_schedule gives (float32|int32)\[2?\]"):
        tx.update(PARAMS, tx.init(PARAMS))


@pytest.mark.parametrize("answer", [1.0, np.array([True])], ids=["number", "array"])
def test_should_skip_update_fn_returns_a_bool(answer):
    tx = MultiSteps(optax.sgd(1.0), 2, should_skip_update_fn=lambda *args: (answer, ()))
    with pytest.raises(ValueError, match="must be a boolean scalar"):
        tx.init(PARAMS)


# --- Eight CPU devices ----------------------------------------------------------------------------

SPECS = {"rows": P("x"), "both": P("x", "y"), "replicated": P()}
SHAPES = {"rows": (128, 1024), "both": (256, 512), "replicated": (64,)}
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
# Random bits of the ratio code follow from the place in a shard.
paged_dynamic = functools.partial(paged_adamw8bit, quantization=Quantization("dynamic"))


@pytest.fixture
def eight(device):
    """Eight CPU devices; runs once."""
    if device.platform != "cpu":
        pytest.skip("runs on CPU devices")
    return jax.devices("cpu")[:8]


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
@pytest.mark.parametrize("inner", [paged_dynamic, optax.adamw], ids=["paged", "optax"])
def test_on_eight_devices(inner, kind, eight):
    tx = MultiSteps(inner(1e-2), 2)

    def train(put):
        rng = np.random.default_rng(0)

        def tree():  # integers, so that means of two are exact
            return put({k: rng.integers(-8, 9, s).astype(np.float32) for k, s in SHAPES.items()})

        params = tree()
        state = jax.jit(tx.init)(params)

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(params, state, grads):
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        for _ in range(5):
            grads = tree()
            params, state = step(params, state, grads)
        return params, state, step.lower(params, state, grads).compile().as_text()

    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind,) * 2, devices=eight)
    shardings = {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}
    expected, _, _ = train(jax.device_put)
    with jax.set_mesh(mesh):
        params, state, program = train(functools.partial(jax.device_put, device=shardings))
    for name, sharding in shardings.items():
        np.testing.assert_allclose(params[name], expected[name], rtol=1e-5, atol=1e-6)
        for leaf in (params[name], state.acc_grads[name]):
            assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim), (name, leaf.sharding)
    assert not [name for name in COLLECTIVES if name in program]
    assert "conditional" in program
    if inner is paged_dynamic:
        assert state.inner_opt_state[0].token.value[1] == 2
        assert len(memory_report(state).devices) == 8


def test_inside_shard_map(eight):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,), devices=eight)
    tx = MultiSteps(paged_dynamic(1e-2), 2)
    params = {"w": jnp.ones((512, 512))}
    state = jax.jit(tx.init)(params)
    specs = jax.tree.map(lambda leaf: P("x") if leaf.ndim == 2 else P(), state)
    update = jax.jit(
        jax.shard_map(
            tx.update, mesh=mesh, in_specs=(P("x"), specs, P("x")), out_specs=(P("x"), specs)
        )
    )
    for i in range(4):
        updates, state = update(params, state, params)
        wanted = -1e-2 * (1 + 1e-4) if i % 2 else 0.0
        np.testing.assert_allclose(updates["w"], wanted, rtol=1e-4)
    assert state.inner_opt_state[0].token.value[1] == 2
