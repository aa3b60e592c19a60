"""Optimizers that are made of several links, formats by leaf, and conversions of all states."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import paged_optax
from helpers import (
    ALL_QUANTIZED,
    FLOAT32_MOMENTS,
    assert_trees_close,
    assert_trees_equal,
    f32,
    is_zero,
    make_tree,
    residuals_of,
    to_jax,
    train,
)
from optax_tables import KNOWN_OPTAX, PAGED
from paged_optax import Quantization, export_moments, memory_report, moments

pytestmark = pytest.mark.usefixtures("on_cpu")

SHAPES = {"b": (7,), "s": (), "v": (70, 70), "w": (64, 80)}
RATE = 1e-2
STEPS = 5


def params_and_grads(num_steps=STEPS, num_bad=0):
    grads = [make_tree(1 + i, SHAPES) for i in range(num_steps)]
    for i in range(num_bad):
        grads[i]["w"].ravel()[i] = np.nan
    return make_tree(0, SHAPES), grads


def mask(params):
    return {name: np.ndim(param) > 1 for name, param in params.items()}


# Optax's, and ours with the same arguments.
COMPOSED = {
    "lamb": (optax.lamb, paged_optax.paged_lamb8bit, {}),
    "lamb_decayed": (
        optax.lamb,
        paged_optax.paged_lamb8bit,
        {"b1": 0.8, "eps_root": 1e-6, "weight_decay": 0.1, "mask": mask},
    ),
    "lars": (optax.lars, paged_optax.paged_lars8bit, {"trust_coefficient": 0.1}),
    "lars_masked": (
        optax.lars,
        paged_optax.paged_lars8bit,
        {
            **{"weight_decay": 0.1, "weight_decay_mask": mask, "trust_ratio_mask": mask},
            **{"momentum": 0.8, "nesterov": True, "eps": 1e-3},
        },
    ),
    "nadamw": (optax.nadamw, paged_optax.paged_nadamw8bit, {"weight_decay": 0.1, "mask": mask}),
    "rmsprop_momentum": (optax.rmsprop, paged_optax.paged_rmsprop8bit, {"momentum": 0.9}),
    "rmsprop_everything": (
        optax.rmsprop,
        paged_optax.paged_rmsprop8bit,
        {
            **{"centered": True, "momentum": 0.9, "nesterov": True, "eps": 1e-3},
            **{"initial_scale": 0.1, "bias_correction": False, "eps_in_sqrt": False},
        },
    ),
    "muon": (optax.contrib.muon, paged_optax.paged_muon8bit, {}),
    "muon_everything": (
        optax.contrib.muon,
        paged_optax.paged_muon8bit,
        {
            **{"ns_coeffs": "dion", "ns_steps": 5, "beta": 0.9, "nesterov": False},
            **{"adaptive": True, "preconditioning": "schatten", "consistent_rms": 0.2},
            **{"weight_decay": 0.1, "weight_decay_mask": True},
            **{"adam_b1": 0.8, "adam_learning_rate": 1e-3},
            "muon_weight_dimension_numbers": lambda params: {
                "b": None,
                "s": None,
                "v": optax.contrib.MuonDimensionNumbers(1, 0),
                "w": optax.contrib.MuonDimensionNumbers(),
            },
        },
    ),
}
every_composed = pytest.mark.parametrize("name", COMPOSED)


# Arguments of optax's that there are not, and ours that optax has not: docs/optimizers.md says so.
ONLY_THEIRS = {"scale_by_lion": {"mode", "smooth_beta"}, "nadamw": {"nesterov"}, "signum": {"beta"}}
ONLY_OURS = {"signum": {"decay", "weight_decay", "mask"}}
OTHER_DEFAULTS = {"sgd": {"momentum"}, "nadam": {"nesterov"}}
OURS = {"missing", "non_finite", "paging", "param_rounding", "quantization", "replay"}
DTYPES = {"accumulator_dtype", "mu_dtype"}  # by keyword only


@pytest.mark.skipif(optax.__version__ != KNOWN_OPTAX, reason="another release of optax")
@pytest.mark.parametrize("name", PAGED)
def test_arguments_are_those_of_optax(name):
    """Names, order and defaults, but for what is said above."""
    theirs = inspect.signature(getattr(optax, name, None) or getattr(optax.contrib, name))
    ours = inspect.signature(PAGED[name][0])
    wanted = [key for key in theirs.parameters if key not in ONLY_THEIRS.get(name, ())]
    found = [key for key in ours.parameters if key not in OURS | ONLY_OURS.get(name, set())]
    assert [key for key in found if key not in DTYPES] == [
        key for key in wanted if key not in DTYPES
    ]
    assert DTYPES & {*found} == DTYPES & {*wanted}
    for key in set(found) - OTHER_DEFAULTS.get(name, set()):
        assert ours.parameters[key].default == theirs.parameters[key].default, key


@every_composed
@pytest.mark.usefixtures("standard_promotion")
def test_follows_optax(name):
    theirs, ours, arguments = COMPOSED[name]
    params, grads = params_and_grads()
    result, _ = train(ours(RATE, **arguments, quantization=FLOAT32_MOMENTS), params, grads)
    expected, _ = train(theirs(RATE, **arguments), params, grads)
    assert_trees_close(result, expected, rtol=1e-4, atol=2e-5)


@every_composed
@pytest.mark.usefixtures("standard_promotion")
def test_skips_steps_as_a_whole(name):
    """Schedules, momentum and moments stay as they were."""
    _, ours, arguments = COMPOSED[name]
    if "muon" in name:
        arguments = {}
    params, grads = params_and_grads(num_bad=2)
    rate = optax.linear_schedule(1e-2, 1e-3, 4)
    result, state = train(ours(rate, **arguments, non_finite="skip_step"), params, grads)
    expected, other = train(ours(rate, **arguments), params, grads[2:])
    assert_trees_close(result, expected, rtol=1e-6, atol=1e-7)
    assert state.skipped == 2
    for one, two in zip(moments(state), moments(other), strict=True):
        if one is not None:
            assert_trees_equal(one, two)


@every_composed
@pytest.mark.usefixtures("standard_promotion")
def test_skips_elements_alone(name):
    """A bad element moves nothing but, through a norm, the length of its leaf's step."""
    _, ours, arguments = COMPOSED[name]
    if "muon" in name:
        arguments = {}
    params, grads = params_and_grads(2, num_bad=1)
    result, state = train(ours(RATE, **arguments, non_finite="skip_element"), params, grads[:1])
    assert state.skipped == 1
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result))
    for kind, tree in moments(state)._asdict().items():
        if tree is not None and isinstance(tree["w"], np.ndarray):
            start = arguments.get("initial_scale", 0.0) if kind == "nu" else 0.0
            assert abs(tree["w"].ravel()[0] - start) <= start / 128 + 1e-6


@pytest.mark.parametrize("name", ["lars", "rmsprop_momentum"])
@pytest.mark.usefixtures("standard_promotion")
def test_rounds_parameters_after_momentum(name):
    """The last link sees the change of the parameter, so it can keep residuals."""
    _, ours, arguments = COMPOSED[name]
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params_and_grads()[0])
    grads = [jax.tree.map(lambda x: x.astype(jnp.bfloat16), g) for g in params_and_grads()[1]]
    tx = ours(1e-3, **arguments, param_rounding="compensated", quantization=FLOAT32_MOMENTS)
    result, state = train(tx, params, grads)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    exact, _ = train(ours(1e-3, **arguments, quantization=FLOAT32_MOMENTS), wide, grads)
    for one, other in zip(jax.tree.leaves(result), jax.tree.leaves(exact), strict=True):
        np.testing.assert_allclose(one.astype(f32), other, rtol=2**-8, atol=1e-4)
    assert residuals_of(jax.tree.leaves(state, is_leaf=_is_trace)[-1], 2).any()


def _is_trace(node):
    return isinstance(node, paged_optax.ScaleByPagedTrace8bitState)


@pytest.mark.usefixtures("standard_promotion")
def test_bfloat16_momentum_of_muon_is_close_to_float32():
    """With 8 bits and with bfloat16: the distance of a step from float32's."""
    params = {"w": make_tree(0, {"w": (128, 96)})["w"]}
    grads = [make_tree(1 + i, {"w": (128, 96)}) for i in range(20)]
    steps = {}
    for codec in ("ratio", "bfloat16", "float32"):
        tx = paged_optax.paged_muon8bit(1.0, quantization=Quantization(codec))
        state, update = tx.init(params), jax.jit(tx.update)
        for grad in grads:
            updates, state = update(grad, state, params)
        steps[codec] = np.asarray(updates["w"])
    error = {
        codec: np.sum((steps[codec] - steps["float32"]) ** 2) / np.sum(steps["float32"] ** 2)
        for codec in ("ratio", "bfloat16")
    }
    assert error["bfloat16"] < error["ratio"] / 10 < 1e-2


def test_muon_refuses_what_optax_refuses():
    params = {"w": np.ones((8, 8), f32)}
    with pytest.raises(ValueError, match="ns_coeffs must have shape"):
        paged_optax.paged_muon8bit(1.0, ns_coeffs=(1.0, 2.0)).init(params)
    with pytest.raises(ValueError, match="Unknown ns_coeff preset"):
        paged_optax.paged_muon8bit(1.0, ns_coeffs="none")


# --- Schedules and traced hyperparameters --------------------------------------------------------


@pytest.mark.usefixtures("standard_promotion")
def test_schedules_of_ademamix():
    """Of the slow mean's rate and weight, as in optax."""
    b3, alpha = optax.linear_schedule(0.9, 0.9999, 4), optax.linear_schedule(0.0, 5.0, 4)
    params, grads = params_and_grads()
    tx = paged_optax.paged_ademamix8bit(RATE, b3=b3, alpha=alpha, quantization=FLOAT32_MOMENTS)
    result, _ = train(tx, params, grads)
    expected, _ = train(optax.contrib.ademamix(RATE, b3=b3, alpha=alpha), params, grads)
    assert_trees_close(result, expected, rtol=1e-4, atol=1e-6)
    bad = paged_optax.scale_by_paged_ademamix8bit(b3=lambda count: 1.5)
    with pytest.raises(ValueError, match="b3, from its schedule, is 1.5"):
        bad.update(grads[0], bad.init(params))


INJECTED = {
    "sgd": (paged_optax.paged_sgd8bit, {"learning_rate": RATE, "momentum": 0.9}),
    "rmsprop": (paged_optax.paged_rmsprop8bit, {"learning_rate": RATE, "momentum": 0.5}),
    "adagrad": (paged_optax.paged_adagrad8bit, {"learning_rate": RATE}),
    "ademamix": (paged_optax.paged_ademamix8bit, {"learning_rate": RATE}),
    "lars": (paged_optax.paged_lars8bit, {"learning_rate": RATE}),
    "lamb": (paged_optax.paged_lamb8bit, {"learning_rate": RATE}),
}


@pytest.mark.parametrize("name", INJECTED)
@pytest.mark.usefixtures("standard_promotion")
def test_inject_hyperparams(name):
    make, arguments = INJECTED[name]
    params, grads = params_and_grads(3)
    static = ("nesterov", "eps_in_sqrt", "centered", "bias_correction")
    static += ("weight_decay_mask", "trust_ratio_mask", "replay")
    known = [key for key in static if key in make.__code__.co_varnames]
    injected = optax.inject_hyperparams(make, static_args=known)(**arguments)
    result, _ = train(injected, params, grads)
    expected, _ = train(make(**arguments), params, grads)
    assert_trees_close(result, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "make, name",
    [
        (functools.partial(paged_optax.scale_by_paged_trace8bit, 1.0), "decay"),
        (functools.partial(paged_optax.scale_by_paged_ema8bit, -0.1), "decay"),
        (functools.partial(paged_optax.paged_sgd8bit, 0.1, 1.0), "momentum"),
        (functools.partial(paged_optax.paged_sgd8bit, 0.1, None), "momentum"),
        (functools.partial(paged_optax.scale_by_paged_rms8bit, eps=-1e-8), "eps"),
        (
            functools.partial(paged_optax.scale_by_paged_rms8bit, initial_scale=-1.0),
            "initial_scale",
        ),
        (functools.partial(paged_optax.scale_by_paged_rss8bit, -0.1), "initial_accumulator_value"),
        (functools.partial(paged_optax.scale_by_paged_ademamix8bit, b3=1.0), "b3"),
        (functools.partial(paged_optax.scale_by_paged_ademamix8bit, alpha=-1.0), "alpha"),
        (functools.partial(paged_optax.paged_muon8bit, 0.1, beta=1.0), "beta"),
    ],
)
def test_values_out_of_range(make, name):
    with pytest.raises(ValueError, match=f"{name} is "):
        make()


@pytest.mark.parametrize("start", [0.1, np.nan, -1.0])
def test_an_initial_value_that_is_traced(start):
    """A bad one makes steps NaN and harms nothing that is stored."""
    grads = {"w": np.full((64, 80), 2.0, f32)}

    @jax.jit
    def step(start):
        tx = paged_optax.scale_by_paged_rss8bit(start)
        return tx.update(grads, tx.init(grads))

    updates, state = step(start)
    assert np.isnan(updates["w"]).all() == (start != 0.1)
    assert np.isfinite(moments(state).sum_of_squares["w"]).all()


# --- Formats by leaf ------------------------------------------------------------------------------


def by_name(params):
    return {name: "bfloat16" if name == "w" else "dynamic" for name in params}


CODECS = {
    "name": ("bfloat16", {"v": "uint16", "w": "uint16"}),
    "tree": ({**dict.fromkeys("bsv", "float32"), "w": "dynamic"}, {"v": "float32", "w": "uint8"}),
    "callable": (by_name, {"v": "uint8", "w": "uint16"}),
}


@pytest.mark.parametrize("kind", CODECS)
def test_a_format_for_each_leaf(kind, tmp_path):
    """The bits of optimizers with that format alone; saved and loaded; small leaves in float32."""
    codec, dtypes = CODECS[kind]
    params, grads = params_and_grads(3)
    tx = paged_optax.scale_by_paged_adam8bit(quantization=Quantization(codec))
    state = tx.init(params)
    for grad in grads:
        updates, state = tx.update(grad, state, params)
    arrays = export_moments(state)
    for name, dtype in (dtypes | {"b": "float32", "s": "float32"}).items():
        (found,) = [x for key, x in arrays.items() if key.endswith(f"['{name}'].0.nu")]
        assert found.dtype == dtype
    names = codec(params) if callable(codec) else codec
    for name in ("v", "w"):
        alone = Quantization(names if isinstance(names, str) else names[name])
        other = paged_optax.scale_by_paged_adam8bit(quantization=alone)
        single = other.init({name: params[name]})
        for grad in grads:
            expected, single = other.update({name: grad[name]}, single)
        np.testing.assert_array_equal(updates[name], expected[name])
    path = tmp_path / "moments"
    paged_optax.save_moments(state, path)
    again = paged_optax.load_moments(tx.init(params), path)
    assert_trees_equal(moments(again), moments(state))
    assert_trees_equal(tx.update(grads[0], again)[0], tx.update(grads[0], state)[0])


def test_a_prefix_and_a_tree_within_a_mask():
    params = {
        "x": {"a": np.ones((64, 80), f32), "b": np.ones((64, 80), f32)},
        "y": np.ones(5000, f32),
    }
    quantization = Quantization({"x": "bfloat16", "y": "ratio"})
    tx = optax.masked(
        paged_optax.scale_by_paged_adam8bit(quantization=quantization), {"x": True, "y": False}
    )
    _, state = tx.update(params, tx.init(params))
    assert {array.dtype.name for name, array in export_moments(state).items() if "mu" in name} == {
        "uint16"
    }


def test_bad_codecs():
    params = {"w": np.ones((64, 80), f32)}
    for codec, match in (({"w": "none"}, "unknown codec 'none'"), (lambda p: 3, "unknown codec 3")):
        tx = paged_optax.scale_by_paged_adam8bit(quantization=Quantization(codec))
        with pytest.raises(ValueError, match=match):
            tx.update(params, tx.init(params))
    tx = paged_optax.scale_by_paged_adam8bit(quantization=Quantization({"v": "ratio"}))
    with pytest.raises(ValueError):
        tx.update(params, tx.init(params))


@pytest.mark.parametrize("codec, size", [("bfloat16", 2), ("float32", 4)])
def test_bytes_of_wide_formats(codec, size):
    params = {"w": np.ones((256, 256), f32)}
    tx = paged_optax.paged_ademamix8bit(RATE, quantization=Quantization(codec, min_size=0))
    _, state = tx.update(params, tx.init(params), params)
    assert memory_report(state).total == 3 * size * params["w"].size


# --- Conversions ----------------------------------------------------------------------------------

CONVERTED = {
    "sgd": (optax.sgd(RATE, 0.9), paged_optax.paged_sgd8bit, {"momentum": 0.9}),
    "rmsprop": (
        optax.chain(
            optax.scale_by_rms(bias_correction=True, initial_scale=0.1),
            optax.scale_by_learning_rate(RATE),
        ),
        paged_optax.paged_rmsprop8bit,
        {"bias_correction": True, "initial_scale": 0.1},
    ),
    "centered": (
        optax.rmsprop(RATE, centered=True, momentum=0.5, eps=1e-3),
        paged_optax.paged_rmsprop8bit,
        {"centered": True, "momentum": 0.5, "eps": 1e-3},
    ),
    "adagrad": (optax.adagrad(RATE), paged_optax.paged_adagrad8bit, {}),
    "ademamix": (optax.contrib.ademamix(RATE), paged_optax.paged_ademamix8bit, {}),
    "muon": (optax.contrib.muon(RATE), paged_optax.paged_muon8bit, {}),
}


@pytest.mark.parametrize("name", CONVERTED)
@pytest.mark.usefixtures("standard_promotion")
def test_from_optax_and_back(name):
    """A run that changes between the two is the run of either."""
    theirs, make, arguments = CONVERTED[name]
    ours = make(RATE, **arguments, quantization=FLOAT32_MOMENTS)
    params, grads = params_and_grads(4)
    expected, _ = train(theirs, params, grads)
    params, state = train(theirs, params, grads[:2])
    paged = paged_optax.from_optax(ours.init(params), state)

    def go_on(tx, params, state, grad):
        updates, state = jax.jit(tx.update)(grad, state, params)
        return optax.apply_updates(params, updates), state

    params, paged = go_on(ours, params, paged, to_jax(grads[2]))
    if name == "muon":
        with pytest.raises(NotImplementedError, match="coefficients"):
            paged_optax.to_optax(paged)
        params, _ = go_on(ours, params, paged, to_jax(grads[3]))
    else:
        params, _ = go_on(theirs, params, paged_optax.to_optax(paged), to_jax(grads[3]))
    assert_trees_close(params, expected, rtol=1e-4, atol=1e-5)


def test_bitsandbytes_has_no_such_state():
    params = {"w": np.ones((64, 80), f32)}
    tx = paged_optax.scale_by_paged_ema8bit(0.9, quantization=ALL_QUANTIZED)
    updates, state = tx.update(params, tx.init(params))
    assert not is_zero(updates)
    with pytest.raises(ValueError, match="the rule 'ema'; it has Adam, AdamW or LAMB, AdEMAMix"):
        paged_optax.to_bitsandbytes(state, ["['w']"])


# --- In place -------------------------------------------------------------------------------------

IN_PLACE = {name: row[1:] for name, row in COMPOSED.items()} | {
    "sgd": (paged_optax.paged_sgd8bit, {"momentum": 0.9}),
    "ademamix": (paged_optax.paged_ademamix8bit, {"b3": optax.linear_schedule(0.9, 0.999, 9)}),
}


@pytest.mark.parametrize("name", ["lamb", "lars", "rmsprop_momentum", "muon", "sgd", "ademamix"])
@pytest.mark.usefixtures("standard_promotion")
def test_steps_in_place(name):
    """The parameters of `tx.update` and `apply_updates`, up to a contraction in XLA."""
    make, arguments = IN_PLACE[name]
    tx = make(optax.linear_schedule(1e-2, 1e-3, 9), **arguments)
    params, grads = params_and_grads(3)
    expected, _ = train(tx, params, grads)
    state = tx.init(params)
    params, step = to_jax(params), jax.jit(functools.partial(paged_optax.apply_gradients, tx))
    for grad in grads:
        params, state = step(to_jax(grad), state, params)
    assert_trees_close(params, expected, rtol=1e-5, atol=1e-6)
