"""States of bitsandbytes' other optimizers come over: SGD, RMSprop, Adagrad, AdEMAMix, LAMB."""

from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import paged_optax
from helpers import assert_trees_equal, f32, make_tree, reference, stored_leaves, to_jax
from paged_optax import Quantization, from_bitsandbytes, moments, to_bitsandbytes
from test_bitsandbytes import NESTED, SIZE, entry_of, load
from test_golden import inputs
from test_golden_family import RUNS, WHOLE, states_of

DYNAMIC = Quantization("dynamic")
FLOAT32 = Quantization("float32")
NAMES = ["['w']"]
LOST = r"\['w'\]: it has 9572 elements.* the last 100 values of m1 and the first 256 of m2"

pytestmark = pytest.mark.usefixtures("on_cpu")


@pytest.mark.parametrize("run", ["sgd8", "rmsprop8", "adagrad8", "ademamix8"])
def test_their_run_goes_on(run):
    """From their step 5 to our step 25: all codes are those of their step 25.

    But for the blocks of AdEMAMix whose scales theirs has lost.
    """
    golden, tx = load(run, "float32"), RUNS[run]

    @jax.jit
    def step(params, state, grad):
        updates, state = tx.update({"w": grad}, state, params)
        return optax.apply_updates(params, updates), state

    initial, grads = inputs("float32")
    params = {"w": jnp.asarray(initial)}
    state = tx.init(params)
    for grad in grads[:5]:  # the parameters, of which SGD's gradients take a part
        params, state = step(params, state, jnp.asarray(grad))
    theirs = entry_of(golden, 4, "nested")
    expected = pytest.warns(RuntimeWarning, match=LOST) if run == "ademamix8" else nullcontext()
    with expected:
        state = from_bitsandbytes(tx.init(params), theirs, params, NAMES)
    for grad in grads[5:]:
        params, state = step(params, state, jnp.asarray(grad))
    (stored,) = stored_leaves(state)
    half = len(stored) // 2
    for codes, scales, (their_codes, their_scales) in zip(
        stored[:half], stored[half:], states_of(golden, 24), strict=True
    ):
        part = WHOLE if run == "ademamix8" else slice(SIZE)
        np.testing.assert_array_equal(codes[:SIZE][part], their_codes[part])
        blocks = slice(1, 37) if run == "ademamix8" else slice(None)
        np.testing.assert_allclose(scales[blocks], their_scales[blocks], rtol=2e-6)


# --- AdEMAMix's two means in one tensor ---------------------------------------------------------


def ademamix_of(size, zeros=slice(0)):
    """Means and mean squares, and their codes and scales."""
    rng = np.random.default_rng(size)
    values = [rng.standard_normal(size).astype(f32) * scale for scale in (1.0, 1e-3)]
    values.append(rng.random(size).astype(f32))
    for each in values:
        each[zeros] = 0
    return [reference.quantize(x, signed) for x, signed in zip(values, (1, 1, 0), strict=True)]


def ademamix_entry(stored, size, absmax1):
    tensors = {
        "state1": np.stack([x.codes[:size] for x in stored[:2]]),
        "absmax1": absmax1,
        "qmap1": reference.dynamic_map(True),
        "state2": stored[2].codes[:size],
        "absmax2": stored[2].scales,
        "qmap2": reference.dynamic_map(False),
    }
    return {"state": {0: {"step": 3, NESTED: tensors}}}


def read_ademamix(theirs, size):
    tx = paged_optax.scale_by_paged_ademamix8bit(quantization=DYNAMIC)
    params = {"w": jnp.zeros(size)}
    state = from_bitsandbytes(tx.init(params), theirs, params, NAMES)
    found = moments(state)
    return [found.m1["w"], found.m2["w"], found.nu["w"]]


def values_of(stored, size):
    return [reference.dequantize(x, i < 2)[:size] for i, x in enumerate(stored)]


@pytest.mark.parametrize("size", [5120, 5000])
@pytest.mark.parametrize("num_idle", range(6))
def test_scales_of_a_cpu(size, num_idle):
    """Each mean has a row of its own; the last blocks may have had no gradient."""
    stored = ademamix_of(size, slice(256 * (20 - num_idle), None))
    rows = np.stack([x.scales for x in stored[:2]])
    found = read_ademamix(ademamix_entry(stored, size, rows), size)
    for values, expected in zip(found, values_of(stored, size), strict=True):
        np.testing.assert_array_equal(values, expected)


@pytest.mark.parametrize("num_idle", range(6))
@pytest.mark.parametrize("last", ["m1", "m2"])
def test_scales_of_a_gpu(num_idle, last):
    """Where the size is no multiple of 256 one place is shared, whichever mean wrote it last."""
    size = 5000
    stored = ademamix_of(size, slice(256 * (20 - num_idle), None))
    m1, m2 = (x.scales for x in stored[:2])
    shared = m1[-1] if last == "m1" else m2[0]
    rows = np.concatenate([m1[:-1], [shared], m2[1:], [0]]).astype(f32).reshape(2, -1)
    with pytest.warns(RuntimeWarning, match="the last 136 values of m1 and the first 256 of m2"):
        found = read_ademamix(ademamix_entry(stored, size, rows), size)
    expected = values_of(stored, size)
    expected[0][4864:] = expected[1][:256] = 0
    for values, wanted in zip(found, expected, strict=True):
        np.testing.assert_array_equal(values, wanted)


def test_sizes_that_would_lose_scales_go_back_in_float32():
    """In 8 bits bitsandbytes would read scales of the other mean."""
    tx = paged_optax.scale_by_paged_ademamix8bit(quantization=DYNAMIC)
    params = {"a": jnp.ones(5000), "w": jnp.ones(5120)}
    _, state = tx.update(params, tx.init(params))
    theirs = to_bitsandbytes(state, ["['a']", "['w']"], nested=False)["state"]
    assert theirs[0]["state1"].dtype == f32 and theirs[0]["state1"].shape == (2, 5000)
    assert "absmax1" not in theirs[0]
    assert theirs[1]["state1"].dtype == np.uint8 and theirs[1]["absmax1"].shape == (2, 20)
    back = from_bitsandbytes(tx.init(params), theirs, params, ["['a']", "['w']"])
    assert_trees_equal(moments(back), moments(state))


# --- All of them, there and back ----------------------------------------------------------------

SHAPES = {"b": (7,), "kernel": (64, 80), "scale": ()}
ORDER = ["['scale']", "['kernel']", "['b']"]
MAKE = {
    "lion": (paged_optax.paged_lion8bit, optax.lion, {}),
    "sgd": (paged_optax.paged_sgd8bit, optax.sgd, {"momentum": 0.9}),
    "rmsprop": (paged_optax.paged_rmsprop8bit, optax.rmsprop, {}),
    "adagrad": (paged_optax.paged_adagrad8bit, optax.adagrad, {}),
    "ademamix": (paged_optax.paged_ademamix8bit, optax.contrib.ademamix, {}),
    "lamb": (paged_optax.paged_lamb8bit, optax.lamb, {}),
}
every_optimizer = pytest.mark.parametrize("name", MAKE)


def trained(tx, params):
    state = tx.init(params)
    for i in range(3):
        _, state = tx.update(to_jax(make_tree(i, SHAPES)), state, params)
    return state


@every_optimizer
@pytest.mark.parametrize("transposed", [(), ("['kernel']",)])
def test_there_and_back(name, transposed):
    """Nothing changes where nothing is transposed; else codes are rounded twice."""
    make, _, arguments = MAKE[name]
    tx, params = make(1e-3, **arguments, quantization=DYNAMIC), to_jax(make_tree(0, SHAPES))
    state = trained(tx, params)
    theirs = to_bitsandbytes(state, ORDER, transposed=transposed)
    tensor = theirs["state"][1][NESTED]["state1"]
    shape = (80, 64) if transposed else (64, 80)
    assert tensor.dtype == np.uint8 and tensor.shape[-2:] == shape
    before = moments(state)
    back = from_bitsandbytes(tx.init(params), theirs, params, ORDER, transposed=transposed)
    after = moments(back)
    if not transposed:
        assert_trees_equal(after, before)
    for one, other in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=0.02 * np.abs(other).max())
    _, back = tx.update(params, back, params)
    assert int(jax.tree.leaves(back)[0]) == 4


@every_optimizer
@pytest.mark.usefixtures("standard_promotion")
def test_32_bits(name):
    """What their 32-bit optimizers keep, written by hand of optax's states, goes on as in optax."""
    make, theirs, arguments = MAKE[name]
    params = to_jax(make_tree(0, SHAPES))
    plain, paged_tx = theirs(1e-2, **arguments), make(1e-2, **arguments, quantization=FLOAT32)
    plain_state = trained(plain, params)
    inner = plain_state[0]
    fields = [name for name in inner._fields if not name.startswith("count")]
    trees = [getattr(inner, field) for field in fields]
    entries = {}
    for number, path in enumerate(ORDER):
        arrays = [np.asarray(tree[path[2:-2]]) for tree in trees]
        if name == "ademamix":
            arrays = [np.stack(arrays[:2]), arrays[2]]
        entries[number] = {"step": 3} | {f"state{i}": a for i, a in enumerate(arrays, 1)}
        if name == "lamb":
            entries[number]["unorm_vec"] = np.ones(1, f32)
    state = from_bitsandbytes(paged_tx.init(params), {"state": entries}, params, ORDER)
    grads = to_jax(make_tree(9, SHAPES))
    expected, _ = plain.update(grads, plain_state, params)
    found, _ = paged_tx.update(grads, state, params)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


# --- What is refused ----------------------------------------------------------------------------


def sgd(**options):
    return paged_optax.paged_sgd8bit(1e-3, 0.9, **options)


def rmsprop(**options):
    return paged_optax.paged_rmsprop8bit(1e-3, **options)


def adagrad(**options):
    return paged_optax.paged_adagrad8bit(1e-3, **options)


def adamw(**options):
    return paged_optax.paged_adamw8bit(1e-3, **options)


def ademamix(**options):
    return paged_optax.paged_ademamix8bit(1e-3, **options)


def eight_bits(theirs):
    """Leaves the small parameters without anything negative."""
    for number in (0, 2):
        tensors = theirs["state"][number][NESTED]
        tensors["state1"] = np.abs(tensors["state1"])


def lars(theirs):
    theirs["state"][1][NESTED]["unorm_vec"] = np.ones(1, f32)


def one_mean(theirs):
    tensors = theirs["state"][1][NESTED]
    tensors["state1"] = tensors["state1"][0]


def one_row(theirs):
    tensors = theirs["state"][1][NESTED]
    tensors["absmax1"] = tensors["absmax1"][0]


REFUSED = {
    "Adam's for SGD": (adamw, sgd, None, r"\['b'\]: its state has a state2, .* that of SGD"),
    "SGD's for Adam": (sgd, adamw, None, r"has no state2, as of Lion, SGD.* that of Adam, AdamW"),
    "SGD's for RMSprop": (sgd, rmsprop, None, r"\['b'\]: 1 of 7 values of state1 .* RMSprop"),
    "SGD's for Adagrad, 8 bits": (
        sgd,
        adagrad,
        eight_bits,
        r"\['kernel'\]: \d+ of 5120 .* Adagrad",
    ),
    "AdEMAMix's for Adam": (ademamix, adamw, None, "make opt_state with paged_ademamix8bit"),
    "Adam's for AdEMAMix": (adamw, ademamix, None, "begin with fresh moments"),
    "AdEMAMix32bit": (ademamix, ademamix, one_mean, r"shape \(64, 80\).*AdEMAMix32bit"),
    "scales of one mean": (ademamix, ademamix, one_row, r"absmax1 .* \(20,\).* have \(2, 20\)"),
    "LARS": (sgd, sgd, lars, r"\['kernel'\]: its state has a unorm_vec, as of LARS"),
    "Muon": (
        adamw,
        lambda **options: paged_optax.paged_muon8bit(1e-3, **options),
        None,
        "ScaleByPaged(Muon|Adam)8bitState",
    ),
    "any": (
        adamw,
        lambda **options: paged_optax.paged(optax.adan(1e-3), **options),
        None,
        "opt_state has a PagedArraysState, and bitsandbytes has no optimizer",
    ),
    "two states": (
        rmsprop,
        lambda **options: paged_optax.paged_rmsprop8bit(1e-3, momentum=0.9, **options),
        None,
        "moments of 1 paged states, and the optimizer state has 2",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.usefixtures("standard_promotion")
def test_states_of_another_optimizer_are_refused(case):
    make, other, change, message = REFUSED[case]
    params = to_jax(make_tree(0, SHAPES))
    theirs = to_bitsandbytes(trained(make(quantization=DYNAMIC), params), ORDER)
    if change:
        change(theirs)
    fresh = other(quantization=DYNAMIC).init(params)
    with pytest.raises(ValueError, match=message):
        from_bitsandbytes(fresh, theirs, params, ORDER)


def test_scales_of_zero_have_no_sign():
    """Blocks without a gradient have any codes, since their scale is 0."""
    tx = rmsprop(quantization=DYNAMIC)
    params = {"w": jnp.zeros(5120)}
    _, state = tx.update({"w": jnp.ones(5120).at[:256].set(0)}, tx.init(params), params)
    theirs = to_bitsandbytes(state, NAMES)
    tensors = theirs["state"][0][NESTED]
    assert tensors["absmax1"][0] == 0 < tensors["absmax1"][1]
    tensors["state1"] = tensors["state1"].copy()
    tensors["state1"][:256] = 0  # -0.99 in the signed map
    back = from_bitsandbytes(tx.init(params), theirs, params, NAMES)
    assert_trees_equal(moments(back).nu, moments(state).nu)


@pytest.mark.parametrize("codec", ["ratio", "bfloat16", "float32"])
def test_other_formats_round_once(codec):
    make, _, arguments = MAKE["ademamix"]
    params = to_jax(make_tree(0, SHAPES))
    state = trained(make(1e-3, **arguments, quantization=DYNAMIC), params)
    theirs = to_bitsandbytes(state, ORDER)
    tx = make(1e-3, **arguments, quantization=Quantization(codec))
    back = from_bitsandbytes(tx.init(params), theirs, params, ORDER)
    assert_trees_equal(moments(back), moments(state))
    updates, back = tx.update(params, back, params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(updates))
