"""`skip_non_finite`: one look at the raw gradients decides for everything inside.

The oracles are runs that never saw the bad step, the NumPy reference, and `optax.apply_if_finite`.
"""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import paged_optax
from helpers import assert_trees_close, leaf_keys, reference, same_bits
from paged_optax import (
    Quantization,
    SkipNonFiniteState,
    moments,
    paged_adam8bit,
    paged_adamw8bit,
    paged_lion8bit,
    release,
    scale_by_paged_adam8bit,
    scale_by_paged_lion8bit,
    skip_non_finite,
)

f32 = np.float32
SHAPES = {"w": (64, 80), "b": (50,), "h": (70, 70)}
DTYPES = {"w": f32, "b": f32, "h": ml_dtypes.bfloat16}
LABELS = {"w": "a", "b": "b", "h": "a"}
BAD = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf, "square": 1e30}


@pytest.fixture(autouse=True)
def standard_promotion():
    """For optax's own arithmetic with float32 scalars and bfloat16 parameters."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def make_tree(seed, value=None, leaf="b"):
    rng = np.random.default_rng(seed)
    tree = {k: rng.standard_normal(s).astype(DTYPES[k]) for k, s in SHAPES.items()}
    if value is not None:
        tree[leaf].ravel()[7] = value
    return tree


def assert_equal(actual, expected):
    def equal(a, b):
        np.testing.assert_array_equal(np.asarray(a, f32), np.asarray(b, f32))

    jax.tree.map(equal, actual, expected)


def assert_close(actual, expected, num_steps, term):
    """XLA rounds what is of 16 bits as its fusions please: clipping, moments and updates.

    A step rounds no number more often than ten times; terms that may cancel are up to `term`.
    """
    to_arrays = functools.partial(jax.tree.map, np.asarray)
    ulps = 2 * 10 * num_steps
    assert_trees_close(to_arrays(actual), to_arrays(expected), ulps=ulps, term=term, term_ulps=ulps)


def without_tokens(state):
    """Numbers of two runs to compare: handles differ."""
    return jax.tree.map_with_path(
        lambda path, x: None if "token" in jax.tree_util.keystr(path) else x, state
    )


# ------------------------------------------------------------------------------------- steps


def clipped(tx):
    return optax.chain(optax.clip_by_global_norm(1.0), tx)


CHAINS = {
    "clip": lambda: clipped(paged_adamw8bit(optax.linear_schedule(0.1, 0.0, 5))),
    "rounded": lambda: clipped(paged_adamw8bit(0.1, param_rounding="compensated")),
    "replay": lambda: clipped(paged_adamw8bit(0.1, replay=True)),
    "lion": lambda: clipped(paged_lion8bit(0.01)),
    "adam and lion": lambda: optax.partition(
        {"a": paged_adamw8bit(0.1), "b": paged_lion8bit(0.01, param_rounding="stochastic")}, LABELS
    ),
    "momentum": lambda: optax.chain(optax.trace(0.9), scale_by_paged_adam8bit(), optax.ema(0.9)),
    "partition": lambda: clipped(
        optax.partition({"a": paged_adamw8bit(0.1), "b": optax.sgd(0.1, momentum=0.9)}, LABELS)
    ),
    "two paged": lambda: optax.partition(
        {"a": clipped(paged_adamw8bit(0.1)), "b": paged_adam8bit(0.2)}, LABELS
    ),
    "masked alone": lambda: optax.masked(paged_adamw8bit(0.1), {"w": True, "b": True, "h": False}),
    "masked": lambda: optax.masked(
        clipped(paged_adamw8bit(0.1)), {"w": True, "b": True, "h": False}
    ),
    "injected": lambda: optax.inject_hyperparams(paged_adamw8bit, hyperparam_dtype=jnp.float32)(
        optax.linear_schedule(0.1, 0.0, 5)
    ),
    "accumulated": lambda: paged_optax.MultiSteps(
        clipped(paged_adamw8bit(0.1)), 2
    ).gradient_transformation(),
    "schedule after it": lambda: optax.chain(
        paged_adamw8bit(0.1), optax.scale_by_schedule(lambda count: 1.0 / (1 + count))
    ),
}


@pytest.mark.parametrize("factory", CHAINS.values(), ids=CHAINS)
def test_a_skipped_step_leaves_no_trace(device, factory):
    """As a run without it: parameters, and every number of the state."""
    plain, careful = factory(), skip_non_finite(factory(), "step")
    params = other = jax.device_put(make_tree(0), device)
    state, other_state = plain.init(params), careful.init(params)
    num_skipped = 0
    for count, value in enumerate([np.nan, None, np.inf, None, 1e30, None, None, -np.inf]):
        grads = make_tree(count, value, leaf="b" if count % 4 else "w")
        if value is None:
            updates, state = plain.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        updates, other_state = careful.update(grads, other_state, other)
        other = optax.apply_updates(other, updates)
        num_skipped += value is not None
        assert other_state.skipped == num_skipped
        if value is not None:
            assert not any(np.any(u) for u in jax.tree.leaves(updates))
        assert_equal(other, params)
        assert_equal(without_tokens(other_state.inner_state), without_tokens(state))
    assert_equal(moments(other_state), moments(state))


def test_as_apply_if_finite_without_a_paged_optimizer():
    """optax rolls back any state; the wrapper does so around optimizers of optax as well."""
    inner = clipped(optax.adam(0.1))
    plain, careful = optax.apply_if_finite(inner, 99), skip_non_finite(inner, "step")
    params = make_tree(0)
    state, careful_state = plain.init(params), careful.init(params)
    for count, value in enumerate([None, np.nan, None, np.inf]):
        grads = make_tree(count, value)
        updates, state = plain.update(grads, state, params)
        careful_updates, careful_state = careful.update(grads, careful_state, params)
        # XLA compiles one of the two, and rounds it as its fusions please.
        assert_close(careful_updates, updates, count + 1, term=0.1)
        # The norm of all gradients is clipped to 1, and a moment has a tenth of a gradient.
        assert_close(careful_state.inner_state, state.inner_state, count + 1, term=0.004)
    assert careful_state.skipped == state.total_notfinite == 2


def test_gradients_that_are_not_floats():
    """Integers are finite; a complex number counts by its magnitude."""
    tx = skip_non_finite(optax.identity(), "step")
    grads = {"i": np.arange(3), "c": np.array([1 + 1j, complex(0, np.nan)], np.complex64)}
    for bad, tree in ((1, grads), (0, grads | {"c": grads["c"][:1]})):
        updates, state = tx.update(tree, tx.init(tree))
        assert state.skipped == bad
        assert_equal(updates["i"], (1 - bad) * grads["i"])


@pytest.mark.parametrize("mode", ["step", "element"])
def test_in_a_scan_with_donation(mode):
    tx = skip_non_finite(clipped(paged_adamw8bit(1e-2, param_rounding="stochastic")), mode)

    @functools.partial(jax.jit, donate_argnums=0)
    def run(params, grads):
        def step(carry, grads):
            updates, state = tx.update(grads, carry[1], carry[0])
            return (optax.apply_updates(carry[0], updates), state), state.skipped

        return jax.lax.scan(step, (params, tx.init(params)), grads)

    steps = [make_tree(i, np.nan if i % 2 else None) for i in range(6)]
    (params, _), counts = run(
        jax.device_put(make_tree(0)), jax.tree.map(lambda *x: jnp.stack(x), *steps)
    )
    assert counts.tolist() == [0, 1, 1, 2, 2, 3]
    assert all(np.isfinite(np.asarray(x, f32)).all() for x in params.values())


# ---------------------------------------------------------------------------------- elements


@pytest.mark.parametrize("codec", ["ratio", "dynamic", "float32"])
@pytest.mark.parametrize("value", BAD.values(), ids=BAD)
def test_a_bad_element_spoils_no_norm(device, value, codec):
    """Clipping sees 0 there; the reference then skips that element and no other."""
    clip = optax.clip_by_global_norm(1.0)
    tx = optax.chain(clip, scale_by_paged_adam8bit(quantization=Quantization(codec)))
    tx = skip_non_finite(tx, "element")
    params = make_tree(0)
    state = jax.device_put(tx.init(params), device)
    expected = {
        k: reference.init_leaf(x.size, x.size >= 4096 and codec != "float32", codec)
        for k, x in params.items()
    }
    for count in range(4):
        grads = make_tree(count, value if count % 2 else None, leaf="w")
        bad = {k: ~(np.abs(g.astype(f32)) < f32(2.0**64)) for k, g in grads.items()}
        clean = {k: np.where(bad[k], g.dtype.type(0), g) for k, g in grads.items()}
        seen, _ = clip.update(jax.device_put(clean, device), clip.init(params))
        updates, state = tx.update(jax.device_put(grads, device), state)
        for k, grad in jax.device_get(seen).items():
            wanted, expected[k] = reference.step_leaf(
                np.where(bad[k], grad.dtype.type(np.nan), grad),
                expected[k],
                count,
                reference.Hyperparams(),
                skip_elements=True,
                leaf_key=leaf_keys((f"['{k}']",), seed=0)[0],
            )
            assert np.isfinite(wanted.astype(f32)).all()
            same_bits(updates[k], wanted, k)
        assert state.skipped == (count + 1) // 2


@pytest.mark.parametrize("rounding", ["nearest", "compensated"])
def test_elements_of_several_paged_optimizers(rounding):
    """Each skips its own; what it returns for the others is what a run with zeros there gets."""

    def make():
        paged = functools.partial(paged_adamw8bit, param_rounding=rounding, weight_decay=0.0)
        return optax.partition({"a": paged(0.1), "b": clipped(paged(0.2))}, LABELS)

    tx, plain = skip_non_finite(make(), "element"), make()
    params = make_tree(0)
    grads = make_tree(1, np.nan, leaf="w")
    grads["b"][3] = np.inf
    zeros = {k: np.where(np.isfinite(g), g, g.dtype.type(0)) for k, g in grads.items()}
    updates, state = tx.update(grads, tx.init(params), params)
    expected, plain_state = plain.update(zeros, plain.init(params), params)
    assert state.skipped == 2
    assert_equal(updates, expected)  # at the first step a gradient of 0 has the direction 0
    assert_equal(moments(state), moments(plain_state))
    before = moments(state)
    updates, state = tx.update(grads, state, params)
    after = moments(state)
    for k in ("w", "b"):
        skipped = ~np.isfinite(grads[k])
        assert not np.any(np.asarray(updates[k])[skipped])
        assert np.all(np.asarray(updates[k], f32)[~skipped])
        assert not np.any(after.mu[k][skipped])
    assert np.all(after.nu["b"][np.isfinite(grads["b"])] > before.nu["b"][np.isfinite(grads["b"])])


def test_other_optimizers_see_zero():
    """They cannot skip an element: their momentum goes on."""
    tx = optax.partition({"a": paged_adam8bit(0.1), "b": optax.sgd(0.1, momentum=0.5)}, LABELS)
    tx = skip_non_finite(tx, "element")
    params = make_tree(0)
    updates, state = tx.update(make_tree(1), tx.init(params), params)
    again, _ = tx.update(make_tree(1, np.nan, leaf="b"), state, params)
    np.testing.assert_allclose(again["b"][7], 0.5 * updates["b"][7], rtol=1e-6)


@pytest.mark.parametrize("factory", [scale_by_paged_adam8bit, scale_by_paged_lion8bit])
def test_moments_of_a_skipped_element_stay(factory):
    tx = skip_non_finite(clipped(factory(quantization=Quantization("float32"))), "element")
    params = make_tree(0)
    _, state = tx.update(make_tree(1), tx.init(params))
    before = moments(state)
    updates, state = tx.update(make_tree(2, np.nan, leaf="w"), state)
    after = moments(state)
    at = np.unravel_index(7, SHAPES["w"])
    assert updates["w"][at] == 0
    assert after.mu["w"][at] == before.mu["w"][at] != 0
    if after.nu is not None:
        assert after.nu["w"][at] == before.nu["w"][at] != 0
    assert np.sum(after.mu["w"] == before.mu["w"]) == 1


# ------------------------------------------------------------------------------- composition


@pytest.mark.parametrize("inner", ["skip_element", "skip_step"])
@pytest.mark.parametrize("outer", ["element", "step"])
def test_around_a_keyword_that_skips_too(outer, inner):
    tx = skip_non_finite(clipped(paged_adamw8bit(0.1, non_finite=inner)), outer)
    params = make_tree(0)
    state, good = tx.init(params), make_tree(1)
    for grads in (good, make_tree(2, np.nan), good):
        updates, state = jax.jit(tx.update)(grads, state, params)
        assert all(np.isfinite(np.asarray(u, f32)).all() for u in updates.values())
    assert state.skipped == 1
    paged = optax.tree.get(state.inner_state, "count", filtering=lambda path, _: True)
    assert paged == (2 if outer == "step" else 3)
    assert optax.tree.get(state.inner_state, "skipped") == 0  # the outer one was first


@pytest.mark.parametrize("mode", ["step", "element"])
def test_inside_of_accumulation_it_looks_at_the_mean(mode):
    params = {"w": jnp.ones((64, 64))}
    tx = paged_optax.MultiSteps(skip_non_finite(clipped(paged_adam8bit(1e-2)), mode), 2)
    state, update = tx.init(params), jax.jit(tx.update)
    for value in (1.0, jnp.nan, 1.0, 1.0):
        updates, state = update({"w": params["w"].at[0, 0].set(value)}, state, params)
    assert np.isfinite(updates["w"]).all() and np.all(updates["w"] < 0)
    assert optax.tree.get(state, "skipped") == 1


def test_elements_around_accumulation():
    """A bad element adds 0 to the mean of its cycle."""
    params = {"w": jnp.ones((64, 64))}
    tx = paged_optax.MultiSteps(scale_by_paged_adam8bit(), 2).gradient_transformation()
    plain, careful = tx, skip_non_finite(tx, "element")
    state, careful_state = plain.init(params), careful.init(params)
    for value, instead in ((jnp.nan, 0.0), (3.0, 3.0)):
        updates, state = plain.update({"w": params["w"].at[0, 0].set(instead)}, state, params)
        others, careful_state = careful.update(
            {"w": params["w"].at[0, 0].set(value)}, careful_state, params
        )
        assert_equal(others, updates)
    assert careful_state.skipped == 1 and np.all(updates["w"])


@pytest.mark.parametrize("mode", ["step", "element"])
def test_inside_of_injected_hyperparameters(mode):
    @optax.inject_hyperparams
    def make(learning_rate):
        return skip_non_finite(clipped(paged_adam8bit(learning_rate)), mode)

    params = {"w": jnp.ones((64, 64))}
    tx = make(optax.linear_schedule(0.2, 0.0, 4))
    state, update = tx.init(params), jax.jit(tx.update)
    for value in (1.0, jnp.nan, 1.0):
        updates, state = update({"w": params["w"].at[0, 0].set(value)}, state, params)
    assert optax.tree.get(state, "skipped") == 1
    np.testing.assert_allclose(updates["w"][1:], -0.1, rtol=1e-2)


@pytest.mark.parametrize("kind", ["Auto", "Explicit", "Manual"])
@pytest.mark.parametrize("mode", ["step", "element"])
def test_all_devices_decide_alike(mode, kind):
    """One bad element on one of eight devices; the state agrees, and the norm is the whole one."""
    kinds = (AxisType.Explicit if kind == "Explicit" else AxisType.Auto,)
    mesh = jax.make_mesh((8,), ("x",), axis_types=kinds, devices=jax.devices("cpu")[:8])
    specs = {"w": P("x"), "r": P()}
    paged = paged_adamw8bit(1e-2, replay=True)
    tx = skip_non_finite(paged if kind == "Manual" else clipped(paged), mode)

    def make(seed):
        rng = np.random.default_rng(seed)
        return {"w": rng.standard_normal((512, 160)).astype(f32), "r": np.ones(300, f32)}

    def put(tree):
        return {k: jax.device_put(x, NamedSharding(mesh, specs[k])) for k, x in tree.items()}

    update = tx.update
    if kind == "Manual":
        update = jax.shard_map(
            update,
            mesh=mesh,
            in_specs=(specs, P(), specs),
            out_specs=(specs, P()),
            check_vma=False,
        )
    update = jax.jit(update)
    with jax.set_mesh(mesh):
        params = put(make(0))
        state = tx.init(params)
        for count in range(3):
            grads = make(count + 1)
            if count == 1:
                grads["w"][200, 7] = np.nan
            updates, state = update(put(grads), state, params)
            updates = jax.device_get(updates)
            assert all(np.isfinite(u).all() for u in updates.values())
            assert (mode == "step" and count == 1) != np.any(updates["w"])
            if mode == "element" and count == 1:  # the step decays, and nothing else
                decay = -1e-2 * 1e-4 * make(0)["w"][200, 7]
                np.testing.assert_allclose(updates["w"][200, 7], decay, rtol=1e-6)
        assert {int(shard.data) for shard in state.skipped.addressable_shards} == {1}
        (count,) = [x for p, x in jax.tree.leaves_with_path(state) if "count" in str(p)]
        assert int(count) == (2 if mode == "step" else 3)
        release(state)


def test_state_and_signature():
    params = make_tree(0)
    tx = skip_non_finite(clipped(paged_adamw8bit(0.1)), "step")
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    state = tx.init(params)
    assert isinstance(state, SkipNonFiniteState) and state.skipped == 0
    assert jax.tree.structure(state.inner_state) == jax.tree.structure(
        clipped(paged_adamw8bit(0.1)).init(params)
    )


def test_other_extra_arguments_are_passed_on():
    plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=1)
    tx = skip_non_finite(optax.chain(plateau, paged_adam8bit(0.1)), "step")
    params = make_tree(0)
    tx.update(make_tree(1), tx.init(params), params, value=jnp.float32(1.0))


# ------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize("mode", ["skip_step", None, True])
def test_unknown_mode(mode):
    with pytest.raises(ValueError, match="mode is .*; it must be one of step, element"):
        skip_non_finite(paged_adam8bit(0.1), mode)


def test_elements_without_a_paged_optimizer():
    with pytest.raises(ValueError, match="no paged optimizer in skip_non_finite.*zero_nans"):
        skip_non_finite(optax.adam(0.1), "element").init(make_tree(0))


def test_state_of_another_optimizer():
    params, inner = make_tree(0), clipped(paged_adam8bit(0.1))
    with pytest.raises(TypeError, match=r"is a tuple, not the SkipNonFiniteState .*'step'\)"):
        skip_non_finite(inner, "step").update(params, inner.init(params), params)


@pytest.mark.parametrize("mode", ["step", "element"])
def test_extra_arguments_that_do_not_arrive(mode):
    """Then nobody would keep the moments from changing."""
    paged = paged_adam8bit(0.1)
    silent = optax.GradientTransformation(paged.init, lambda u, s, p=None: paged.update(u, s, p))
    tx, params = skip_non_finite(optax.chain(silent, optax.scale(1.0)), mode), make_tree(0)
    with pytest.raises(TypeError, match=r"does not pass extra arguments on.*\*\*extra_args"):
        tx.update(params, tx.init(params), params)
    silent.update(params, silent.init(params), params)  # alone it works


WRAPPERS = {
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
    "split_real_and_imaginary": lambda tx: optax.contrib.split_real_and_imaginary(tx),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_wrappers_of_optax_that_pass_nothing_on(wrap):
    tx, params = skip_non_finite(wrap(paged_adam8bit(0.1, replay=True)), "step"), make_tree(0)
    with pytest.raises(TypeError, match="Put skip_non_finite inside.*paged_optax.MultiSteps"):
        tx.update(params, tx.init(params), params)


@pytest.mark.parametrize("wrap", [lambda tx: tx, lambda tx: skip_non_finite(tx, "step")])
def test_another_argument_called_skip(wrap):
    tx, params = wrap(paged_adam8bit(0.1)), make_tree(0)
    with pytest.raises(TypeError, match=r"skip=True.*skip_non_finite alone"):
        tx.update(params, tx.init(params), params, skip=True)


def test_gradients_of_other_names():
    params = make_tree(0)
    tx = optax.flatten(scale_by_paged_adam8bit())
    with pytest.raises(ValueError, match="does not know gradient leaf of shape .*renames or resh"):
        elements = skip_non_finite(tx, "element")
        elements.update(params, elements.init(params))
    steps = skip_non_finite(tx, "step")
    updates, state = steps.update(make_tree(1, np.nan), steps.init(params))
    assert state.skipped == 1 and not np.any(updates["w"])
