"""What gradients that are not finite do: `non_finite="propagate"`, "skip_element", "skip_step".

The oracles are the NumPy reference, and runs that never saw the bad step.
"""

import functools

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import helpers
import paged_optax
from helpers import (
    assert_close_ulps,
    assert_trees_equal,
    count_bad,
    count_elements,
    f32,
    finish,
)
from paged_optax import (
    Quantization,
    SkipNonFiniteState,
    memory_report,
    moments,
    paged_adam8bit,
    paged_adamw8bit,
    scale_by_paged_adam8bit,
)

POLICIES = ["skip_element", "skip_step"]
ROUNDINGS = ["nearest", "stochastic", "compensated"]
SHAPES = {"w": (64, 80), "b": (50,), "h": (70, 70), "g": (300,)}
DTYPES = {"w": f32, "b": f32, "h": ml_dtypes.bfloat16, "g": np.float16}


def make_tree(seed, num_bad=0, value=np.nan):
    tree = helpers.make_tree(seed, SHAPES, DTYPES)
    rng = np.random.default_rng(1000 + seed)
    for leaf in tree.values():
        leaf.ravel()[rng.permutation(leaf.size)[:num_bad]] = value
    return tree


def skipped(state):
    return int(optax.tree.get(state, "skipped"))


def assert_parameters_equal(actual, expected, rounding, num_steps):
    """To the bit, but for what XLA makes of a direction where it rounds parameters itself.

    An update is then rounded thrice: the decay's product, its sum, the product with the rate. It is
    smaller than 0.04.
    """
    if rounding == "nearest":
        terms = {"term": 0.04, "term_ulps": 2 * 3 * num_steps}
        assert_close_ulps(actual, expected, ulps=num_steps, **terms)
    else:
        assert_trees_equal(actual, expected)


# ------------------------------------------------------------------------------ one element


@pytest.mark.fast
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_a_skipped_element_only_decays(rounding):
    params, grads = make_tree(0), make_tree(1)
    tx = paged_adamw8bit(0.5, weight_decay=0.5, param_rounding=rounding, non_finite="skip_element")
    grads["b"][3] = np.nan
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
    np.testing.assert_array_equal(updates["b"][3], f32(-0.25) * params["b"][3])
    assert np.isfinite(updates["b"]).all() and skipped(state) == 1


def test_bad_decay_rates_are_not_skipped():
    """A gradient can be left out, a hyperparameter cannot."""
    tx = optax.inject_hyperparams(scale_by_paged_adam8bit)(b2=0.9, non_finite="skip_element")
    params = {"w": jnp.ones(9)}
    state = tx.init(params)
    state.hyperparams["b2"] = jnp.float32(1.5)
    updates, _ = tx.update(params, state)
    assert np.isnan(updates["w"]).all()


# --------------------------------------------------------------------------------- one step


FACTORIES = {
    "scale_by": lambda rounding, **options: scale_by_paged_adam8bit(**options),
    "adam": lambda rounding, **options: paged_adam8bit(
        optax.linear_schedule(1e-2, 1e-3, 4), param_rounding=rounding, **options
    ),
    "adamw": lambda rounding, **options: paged_adamw8bit(
        optax.linear_schedule(1e-2, 1e-3, 4),
        weight_decay=optax.linear_schedule(0.1, 0.0, 4),
        mask={"w": True, "b": False, "h": True, "g": True},
        param_rounding=rounding,
        **options,
    ),
}


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("replay", [False, True], ids=["one slot", "replay"])
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("name", FACTORIES)
def test_skipped_steps_leave_no_trace(device, name, rounding, replay):
    """As a run without them: parameters, schedules, count, moments, random bits."""
    if name == "scale_by" and rounding != "nearest":
        pytest.skip("has no parameters")
    plain = FACTORIES[name](rounding, replay=replay)
    careful = FACTORIES[name](rounding, replay=replay, non_finite="skip_step")
    params = jax.device_put(make_tree(0), device)
    step, careful_step = jax.jit(plain.update), jax.jit(careful.update)
    now, state = params, jax.device_put(plain.init(params), device)
    other, other_state = params, jax.device_put(careful.init(params), device)
    num_skipped = 0
    for count, value in enumerate([np.nan, 0, np.inf, 0, 1e30, 0, 0, -np.inf]):
        bad = value != 0
        if bad:  # one element of one leaf
            grads = make_tree(count)
            grads["b" if count % 4 else "h"].ravel()[-1] = value
            before = other_state
        else:
            grads = make_tree(count)
            updates, state = step(grads, state, now)
            now = optax.apply_updates(now, updates)
        updates, other_state = careful_step(grads, other_state, other)
        other = optax.apply_updates(other, updates)
        num_skipped += bad
        assert skipped(other_state) == num_skipped
        if bad:
            assert not any(np.any(u) for u in jax.device_get(jax.tree.leaves(updates)))
            assert_trees_equal(other_state.inner_state, before.inner_state)
        assert_parameters_equal(other, now, rounding, num_steps=count + 1)
        assert optax.tree.get(other_state.inner_state[0], "count") == optax.tree.get(
            state[0] if isinstance(state[0], tuple) else state, "count"
        )
    assert_trees_equal(moments(other_state), moments(state))


@pytest.mark.fast
def test_every_step_skipped():
    """The first update that counts may come late; until then there are no moments to speak of."""
    tx = paged_adamw8bit(1e-3, non_finite="skip_step")
    params, bad = {"w": jnp.ones((64, 64))}, {"w": jnp.full((64, 64), jnp.nan)}
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(3):
        updates, state = update(bad, state, params)
        assert not np.any(updates["w"])
    assert skipped(state) == 3
    with pytest.raises(RuntimeError, match="this optimizer state was never updated"):
        moments(state)
    updates, state = update(params, state, params)
    np.testing.assert_allclose(updates["w"], -1e-3, rtol=1e-3)
    assert memory_report(state).total > 0


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_in_a_scan_with_donation(rounding):
    tx = paged_adamw8bit(1e-2, param_rounding=rounding, non_finite="skip_step")

    @functools.partial(jax.jit, donate_argnums=0)
    def run(params, grads):
        def step(carry, grads):
            updates, state = tx.update(grads, carry[1], carry[0])
            return (optax.apply_updates(carry[0], updates), state), skipped_now(state)

        def skipped_now(state):
            return optax.tree.get(state, "skipped")

        return jax.lax.scan(step, (params, tx.init(params)), grads)

    steps = [make_tree(i, num_bad=i % 2) for i in range(6)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *steps)
    (params, state), counts = run(jax.device_put(make_tree(0)), stacked)
    assert counts.tolist() == [0, 1, 1, 2, 2, 3]
    expected, plain = make_tree(0), paged_adamw8bit(1e-2, param_rounding=rounding)
    plain_state = plain.init(expected)
    for grads in steps[::2]:
        updates, plain_state = jax.jit(plain.update)(grads, plain_state, expected)
        expected = optax.apply_updates(expected, updates)
    assert_parameters_equal(params, expected, rounding, num_steps=3)
    assert state.skipped == 3


def test_skipped_step_of_an_old_state_is_refused_too():
    tx = scale_by_paged_adam8bit(non_finite="skip_step")
    grads, bad = {"w": jnp.ones((64, 64))}, {"w": jnp.full((64, 64), jnp.nan)}
    state = tx.init(grads)
    _, old = tx.update(grads, state)
    _, new = tx.update(grads, old)
    with pytest.raises((RuntimeError, ValueError), match="not the newest"):
        finish(tx.update(bad, old))
    _, same = tx.update(bad, new)
    jax.block_until_ready(tx.update(grads, new))  # a skipped step does not use the state up
    del same


@pytest.mark.parametrize("dtype", [f32, ml_dtypes.bfloat16, np.float16], ids=lambda d: d.__name__)
def test_large_and_small_gradients_are_finite(dtype):
    """Up to 2^64, whose square would overflow; no promotion of dtypes on the way."""
    largest = 65504.0 if dtype == np.float16 else 1.8e19
    grads = {"w": np.array([largest, -largest, 6e-8, 0.0], dtype)}
    for policy in POLICIES:
        tx = scale_by_paged_adam8bit(non_finite=policy)
        updates, state = tx.update(grads, tx.init(grads))
        assert skipped(state) == 0
        assert np.isfinite(np.asarray(updates["w"], f32)).all() and np.all(updates["w"][:2])


# ------------------------------------------------------------------------------- composition


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("policy", POLICIES)
def test_wrappers(policy):
    """Wrappers of optax find nothing unusual, and questions find the state."""
    params, good, grads = make_tree(0), make_tree(2), make_tree(1, num_bad=1)
    tx = paged_adamw8bit(1e-2, non_finite=policy)
    _, state = jax.jit(tx.update)(good, tx.init(params), params)
    expected, _ = jax.jit(tx.update)(grads, state, params)
    labels = dict.fromkeys(params, "a")
    for wrapped in (
        optax.chain(optax.identity(), tx),
        optax.masked(tx, dict.fromkeys(params, True)),
        optax.partition({"a": tx}, labels),
        optax.with_extra_args_support(tx),
        optax.inject_hyperparams(paged_adamw8bit, hyperparam_dtype=jnp.float32)(
            1e-2, non_finite=policy
        ),
    ):
        _, state = jax.jit(wrapped.update)(good, wrapped.init(params), params)
        updates, state = jax.jit(wrapped.update)(grads, state, params)
        for k in params:  # injected hyperparameters make updates float32, with fewer roundings
            same_type = np.asarray(updates[k]).astype(expected[k].dtype)
            assert_close_ulps(same_type, np.asarray(expected[k]), ulps=2 * 3)
        assert skipped(state) == (4 if policy == "skip_element" else 1)
        assert memory_report(state).total > 0
        assert moments(state).mu["w"].shape == (64, 80)


@pytest.mark.parametrize("policy", POLICIES)
def test_accumulation(policy):
    """The mean of a cycle is what counts. A step that skips all elements is a step."""
    params = {"w": jnp.ones((64, 64))}
    tx = paged_optax.MultiSteps(paged_adam8bit(1e-2, non_finite=policy), 2)
    state, update = tx.init(params), jax.jit(tx.update)
    for value in (jnp.nan, 1.0, 1.0, 1.0):
        updates, state = update({"w": jnp.full((64, 64), value)}, state, params)
    second = (0.1 / (1 - 0.9**2)) / np.sqrt(0.001 / (1 - 0.999**2))
    expected = -1e-2 * (second if policy == "skip_element" else 1)
    np.testing.assert_allclose(updates["w"], expected, rtol=1e-3)
    assert skipped(state) == (4096 if policy == "skip_element" else 1)


def test_nnx_optimizer():
    class Model(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jnp.ones((64, 64)))

    model = Model()
    optimizer = nnx.Optimizer(model, paged_adamw8bit(1e-2, non_finite="skip_step"), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, scale):
        optimizer.update(model, nnx.grad(lambda m: jnp.sum(m.w[...]) * scale)(model))

    for scale in (1.0, np.nan, 1.0):
        step(model, optimizer, jnp.float32(scale))
    np.testing.assert_allclose(model.w[...], 0.98, rtol=1e-3)
    assert int(optimizer.opt_state.skipped[...]) == 1
    assert memory_report(optimizer).total > 0
    assert moments(nnx.to_pure_dict(nnx.state(optimizer))["opt_state"]).mu is not None


def test_no_leaves():
    for policy in POLICIES:
        tx = paged_adamw8bit(1e-3, non_finite=policy)
        updates, state = tx.update({}, tx.init({}), {})
        assert updates == {} and skipped(state) == 0


# ----------------------------------------------------------------------------------- devices


@pytest.mark.parametrize("rounding", ["nearest", "compensated"])
@pytest.mark.parametrize("kind", ["Auto", "Explicit", "Manual", "pmap"])
@pytest.mark.parametrize("policy", POLICIES)
def test_all_devices_decide_alike(policy, kind, rounding):
    """One bad element on one of eight devices skips the step on all, and the state agrees."""
    devices = jax.devices("cpu")[:8]
    kinds = (AxisType.Explicit if kind == "Explicit" else AxisType.Auto,)
    mesh = jax.make_mesh((8,), ("x",), axis_types=kinds, devices=devices)
    specs = {"w": P("x"), "r": P()}
    shapes = {"w": (512, 160), "r": (300,)}
    tx = paged_adamw8bit(1e-2, param_rounding=rounding, non_finite=policy)

    def put(tree):
        return {k: jax.device_put(x, NamedSharding(mesh, specs[k])) for k, x in tree.items()}

    def make(seed):
        rng = np.random.default_rng(seed)
        return {k: rng.standard_normal(s).astype(ml_dtypes.bfloat16) for k, s in shapes.items()}

    init, update = tx.init, tx.update
    if kind == "Manual":
        update = jax.shard_map(
            tx.update,
            mesh=mesh,
            in_specs=(specs, P(), specs),
            out_specs=(specs, P()),
            check_vma=False,
        )
    update = jax.jit(update)
    if kind == "pmap":
        init, update = jax.pmap(tx.init), jax.pmap(tx.update, axis_name="x")

        def put(tree):  # noqa: F811
            return {
                "w": tree["w"].reshape(8, 64, 160),
                "r": np.broadcast_to(tree["r"], (8, 300)),
            }

    with jax.set_mesh(mesh) if kind != "pmap" else jax.default_device(devices[0]):
        params = put(make(0))
        state = init(params)
        for count in range(3):
            grads = make(count + 1)
            if count == 1:
                grads["w"][200, 7] = np.nan
            updates, state = update(put(grads), state, params)
            updates = {k: np.asarray(u, f32) for k, u in updates.items()}
            if policy == "skip_step" and count == 1:
                assert not any(u.any() for u in updates.values())
            else:
                assert all(np.isfinite(u).all() and u.any() for u in updates.values())
        counter = state.skipped
        assert {int(np.ravel(shard.data)[0]) for shard in counter.addressable_shards} == {1}
        token = state.inner_state[0].token.value
        copies = {tuple(np.ravel(shard.data).tolist()) for shard in token.addressable_shards}
        assert len(copies) == 1
        counts = np.ravel(np.asarray(state.inner_state[0].count))
        assert set(counts.tolist()) == {2 if policy == "skip_step" else 3}


@pytest.mark.parametrize(
    "specs, count, unchecked",
    [((P("x"), P()), 2, 10), ((P("x"), P("y")), 2, 6), ((P(("x", "y")), P("x")), 2, 3)],
    ids=str,
)
def test_count_inside_shard_map(specs, count, unchecked):
    """Each element once where `jax.shard_map` tells what is replicated, else once a device."""
    kinds = (AxisType.Auto, AxisType.Auto)
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=kinds, devices=jax.devices("cpu")[:8])
    grads = np.zeros((2, 8), f32)
    grads[0, 3], grads[1, 0] = np.nan, np.inf
    for check_vma, expected in ((True, count), (False, unchecked)):
        counter = jax.shard_map(
            lambda *grads: count_bad(grads, count_elements),
            mesh=mesh,
            in_specs=specs,
            out_specs=P(),
            check_vma=check_vma,
        )
        assert jax.jit(counter)(*grads) == expected


# ------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize("value", ["skip", None, True])
def test_unknown_policy(value):
    with pytest.raises(ValueError, match="non_finite is .*; it must be one of propagate, skip_el"):
        paged_adamw8bit(1e-3, non_finite=value)


def test_state_of_another_policy():
    params = {"w": jnp.ones((64, 64))}
    state = scale_by_paged_adam8bit().init(params)
    with pytest.raises(TypeError, match="not the SkipNonFiniteState that init returns for"):
        scale_by_paged_adam8bit(non_finite="skip_step").update(params, state)
    state = scale_by_paged_adam8bit(non_finite="skip_step").init(params)
    assert isinstance(state, SkipNonFiniteState)
    with pytest.raises(TypeError, match="the optimizer state is a SkipNonFiniteState, not one"):
        scale_by_paged_adam8bit().update(params, state)


def test_counter_stops_at_its_largest_value():
    tx = scale_by_paged_adam8bit(
        non_finite="skip_element", quantization=Quantization(min_size=2**62)
    )
    bad = {"w": jnp.full(7, jnp.nan)}
    state = tx.init(bad)._replace(skipped=jnp.int32(2**31 - 3))
    for _ in range(2):
        _, state = tx.update(bad, state)
        assert skipped(state) == 2**31 - 1


def test_counter_stops_where_it_would_wrap():
    """XLA makes no array of a broadcast that is only summed."""

    def count(x, *shapes):
        return count_bad([jnp.broadcast_to(x, shape) for shape in shapes], count_elements)

    count = jax.jit(count, static_argnums=(1, 2))
    assert count(jnp.nan, (2**10, 2**10), ()) == 2**20 + 1
    assert count(jnp.nan, (2**12, 2**20), (5,)) == 2**31 - 1
    assert count(jnp.nan, (40, 5120, 13824), (5,)) == 2**31 - 1


@pytest.mark.parametrize("accumulate", ["paged_optax.MultiSteps", "optax.MultiSteps"])
@pytest.mark.parametrize("policy", POLICIES)
@jax.numpy_dtype_promotion("standard")  # optax.MultiSteps needs it
def test_accumulation_goes_on_after_a_bad_gradient(accumulate, policy):
    if accumulate == "optax.MultiSteps":  # its own sum would keep an infinite gradient for ever
        inner = paged_adam8bit(1e-2, non_finite=policy, replay=True)
        tx = optax.MultiSteps(inner, 2, should_skip_update_fn=optax.skip_not_finite)
    else:
        tx = paged_optax.MultiSteps(paged_adam8bit(1e-2, non_finite=policy), 2)
    params = {"w": jnp.ones((64, 80))}
    good = {"w": jnp.full((64, 80), 0.1)}
    bad = {"w": jnp.asarray(np.where(np.arange(64 * 80) == 0, np.inf, 0.1).reshape(64, 80), f32)}
    state, update = tx.init(params), jax.jit(tx.update)
    total = np.zeros((64, 80))
    for step in range(12):
        updates, state = update(bad if step == 2 else good, state, params)
        total += np.asarray(updates["w"]) if step > 3 else 0
    assert (total < 0).all()
    paged_optax.release(state)
