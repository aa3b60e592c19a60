"""States of bitsandbytes come over and go on with the same codes, and go back."""

import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

import paged_optax
from helpers import DTYPES, RAISES, assert_trees_equal, make_tree, reference, to_jax
from paged_optax import Quantization, from_bitsandbytes, moments, to_bitsandbytes

SIZE = 9572
NESTED = "__bnb_optimizer_quant_state__"
DYNAMIC = Quantization("dynamic")
NAMES = ["['w']"]


def load(run, dtype):
    path = pathlib.Path(__file__).parent / "golden" / f"golden_{run}_{dtype}.npz"
    with np.load(path) as file:
        return dict(file)


def gradients(dtype):
    rng = np.random.default_rng(123)
    rng.standard_normal(SIZE)  # the parameters
    scale = np.exp(rng.normal(0, 2, SIZE)).astype(np.float32) * np.float32(1e-2)
    grads = [rng.standard_normal(SIZE).astype(np.float32) * scale for _ in range(25)]
    return [grad.astype(DTYPES[dtype]) for grad in grads]


def entry_of(golden, t, layout):
    """Their state of the parameter after step t + 1."""
    tensors = {}
    for number in "12":
        if f"state{number}_{t}" in golden:
            tensors[f"state{number}"] = golden[f"state{number}_{t}"]
            tensors[f"absmax{number}"] = golden[f"absmax{number}_{t}"]
            tensors[f"qmap{number}"] = reference.dynamic_map(number == "1")
    if layout == "nested":
        return {"state": {0: {"step": t + 1, NESTED: tensors}}, "param_groups": []}
    if layout == "flat":
        return {"state": {0: {"step": t + 1, **tensors}}}
    return {f"state.0.{name}": tensor for name, tensor in tensors.items()} | {
        "state.0.step": np.array(t + 1)
    }


MAKE = {
    "adam8_wd0": lambda: paged_optax.scale_by_paged_adam8bit(quantization=DYNAMIC),
    "adamw8": lambda: paged_optax.scale_by_paged_adam8bit(quantization=DYNAMIC),
    "lion8": lambda: paged_optax.scale_by_paged_lion8bit(quantization=DYNAMIC),
}


@pytest.mark.parametrize("layout", ["nested", "flat", "file"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("run", MAKE)
def test_their_run_goes_on(run, dtype, layout):
    """From their step 5 to our step 25: all codes are those of their step 25."""
    golden, tx = load(run, dtype), MAKE[run]()
    params = {"w": jnp.zeros(SIZE, dtype)}
    state = from_bitsandbytes(tx.init(params), entry_of(golden, 4, layout), params, NAMES)
    assert int(state.count) == 5
    update = jax.jit(tx.update)
    for grad in gradients(dtype)[5:]:
        _, state = update({"w": jnp.asarray(grad)}, state)
    theirs = to_bitsandbytes(state, NAMES, nested=layout == "nested")["state"][0]
    assert theirs["step"] == 25
    tensors = theirs.get(NESTED, theirs)
    for number in "12" if "adam" in run else "1":
        ours, expected = tensors[f"state{number}"], golden[f"state{number}_24"]
        assert ours.dtype == np.uint8 and np.array_equal(ours, expected)
        np.testing.assert_allclose(
            tensors[f"absmax{number}"], golden[f"absmax{number}_24"], rtol=1e-6
        )
    assert ("state2" in tensors) == ("adam" in run)


SHAPES = {"b": (7,), "kernel": (64, 80), "scale": ()}
ORDER = ["['scale']", "['kernel']", "['b']"]  # of bitsandbytes' optimizer


@pytest.fixture
def params():
    return to_jax(make_tree(0, SHAPES))


def trained(tx, params):
    state = tx.init(params)
    for i in range(3):
        _, state = tx.update(to_jax(make_tree(i, SHAPES)), state, params)
    return state


@pytest.mark.parametrize("transposed", [(), ("['kernel']",)])
def test_there_and_back(params, transposed):
    """Nothing changes where nothing is transposed; else codes are rounded twice."""
    tx = paged_optax.scale_by_paged_adam8bit(quantization=DYNAMIC)
    state = trained(tx, params)
    theirs = to_bitsandbytes(state, ORDER, transposed=transposed)
    assert list(theirs["state"]) == [0, 1, 2]
    tensors = theirs["state"][1][NESTED]
    assert tensors["state1"].shape == ((80, 64) if transposed else (64, 80))
    assert theirs["state"][0][NESTED]["state1"].shape == ()
    before = moments(state)
    state = from_bitsandbytes(tx.init(params), theirs, params, ORDER, transposed=transposed)
    after = moments(state)
    if not transposed:
        assert_trees_equal(after, before)
    largest = np.abs(before.mu["kernel"]).max()
    np.testing.assert_allclose(after.mu["kernel"], before.mu["kernel"], atol=0.02 * largest)
    np.testing.assert_array_equal(after.mu["b"], before.mu["b"])
    _, state = tx.update(params, state, params)
    assert int(state.count) == 4


def test_default_format_is_rounded_once(params):
    """Both ways, and a step of the result is about that of optax."""
    tx = paged_optax.paged_adamw8bit(1e-2)
    state = trained(tx, params)
    theirs = to_bitsandbytes(state, ORDER)
    stored = theirs["state"][1][NESTED]
    values = reference.dynamic_map(True)[stored["state1"]].reshape(-1, 256)
    np.testing.assert_allclose(
        values * stored["absmax1"][:, None],
        moments(state).mu["kernel"].reshape(-1, 256),
        atol=0.02 * stored["absmax1"].max(),
    )
    as_optax = paged_optax.to_optax(state)
    state = from_bitsandbytes(tx.init(params), theirs, params, ORDER)
    grads = to_jax(make_tree(9, SHAPES))
    with jax.numpy_dtype_promotion("standard"):
        expected, _ = optax.adamw(1e-2).update(grads, as_optax, params)
    actual, _ = tx.update(grads, state, params)
    np.testing.assert_allclose(actual["b"], expected["b"], rtol=1e-4)
    error = np.asarray(actual["kernel"] - expected["kernel"])
    assert np.mean(error**2) < 0.02 * np.mean(np.asarray(expected["kernel"]) ** 2)


def test_shards_become_one(params):
    """A leaf that is cut over devices goes through float32."""
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("x")
    kernel = {"kernel": jax.device_put(params["kernel"], jax.sharding.NamedSharding(mesh, spec))}
    tx = paged_optax.scale_by_paged_adam8bit(quantization=DYNAMIC)
    _, state = jax.jit(tx.update)(kernel, tx.init(kernel), kernel)
    theirs = to_bitsandbytes(state, ["['kernel']"])["state"][0][NESTED]
    assert theirs["state1"].shape == (64, 80)
    values = reference.dynamic_map(True)[theirs["state1"]].reshape(-1, 256)
    values, expected = values * theirs["absmax1"][:, None], moments(state).mu["kernel"]
    np.testing.assert_allclose(values.reshape(64, 80), expected, atol=0.02 * np.abs(expected).max())


def test_tensors_of_torch(params):
    torch = pytest.importorskip("torch")
    tx = paged_optax.scale_by_paged_adam8bit(quantization=DYNAMIC)
    state = trained(tx, params)
    theirs = jax.tree.map(
        lambda x: torch.from_numpy(x) if isinstance(x, np.ndarray) else torch.tensor(x),
        to_bitsandbytes(state, ORDER),
    )
    back = from_bitsandbytes(tx.init(params), theirs, params, ORDER)
    assert_trees_equal(moments(back), moments(state))


def test_other_byte_order(params):
    tx = paged_optax.scale_by_paged_adam8bit(quantization=DYNAMIC)
    state = trained(tx, params)
    theirs = jax.tree.map(
        lambda x: x.astype(x.dtype.newbyteorder(">")) if isinstance(x, np.ndarray) else x,
        to_bitsandbytes(state, ORDER),
    )
    back = from_bitsandbytes(tx.init(params), theirs, params, ORDER)
    assert_trees_equal(moments(back), moments(state))


def _edit(key, **changes):
    def change(theirs):
        entry = theirs["state"][key]
        for name, value in changes.items():
            target = entry if name == "step" else entry[NESTED]
            if value is None:
                del target[name]
            else:
                target[name] = value(target[name])

    return change


BAD = {
    "no scales": (_edit(1, absmax1=None), r"\['kernel'\]: there is no 'absmax1'"),
    "large blocks": (_edit(1, absmax1=lambda x: x[:3]), r"shape \(3,\), and must have \(20,\)"),
    "other map": (_edit(1, qmap2=lambda x: x * np.float32(2)), "qmap2 is not the dynamic map"),
    "shape": (_edit(1, state1=lambda x: x.T), r"shape \(80, 64\), and must have \(64, 80\)"),
    "AdEMAMix": (_edit(1, state1=lambda x: np.stack([x, x])), r"shape \(2, 64, 80\)"),
    "dtype": (_edit(1, state1=lambda x: x.astype(np.int8)), "state1 is int8, and must be uint8"),
    "half": (_edit(2, state1=lambda x: x.astype(ml_dtypes.bfloat16)), "state1 is bfloat16"),
    "mixed": (_edit(1, state2=lambda x: x.astype(np.float32)), "have different dtypes"),
    "no step": (_edit(1, step=None), "there is no 'step'"),
    "negative": (_edit(1, step=lambda x: -1), "its step is -1"),
    "fraction": (_edit(1, step=lambda x: 2.5), "its step is 2.5, and no whole number"),
    "several": (_edit(1, step=lambda x: [3, 3]), r"its step is \[3, 3\]"),
    "text": (_edit(1, step=lambda x: "3"), "its step is '3'"),
    "no dict": (lambda theirs: theirs["state"][1].update({NESTED: 3}), "is a int, no dict"),
    "steps": (_edit(1, step=lambda x: 7), "different numbers of steps"),
    "one moment": (_edit(1, state2=None), r"\['kernel'\]: its state has no state2, as of Lion"),
    "parameter": (lambda theirs: theirs["state"].pop(1), r"no parameter 1, which is \['kernel'\]"),
    "empty": (lambda theirs: theirs["state"].clear(), "saved before the first step"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_state_is_refused(case, params):
    tx = paged_optax.scale_by_paged_adam8bit(quantization=DYNAMIC)
    theirs = to_bitsandbytes(trained(tx, params), ORDER)
    change, message = BAD[case]
    change(theirs)
    with pytest.raises((ValueError, TypeError), match=message):
        from_bitsandbytes(tx.init(params), theirs, params, ORDER)


@pytest.mark.parametrize("bad", [np.nan, -1.0, np.inf])
def test_bad_scales_are_refused_by_the_first_step(bad, params):
    tx = paged_optax.scale_by_paged_adam8bit(quantization=DYNAMIC)
    theirs = to_bitsandbytes(trained(tx, params), ORDER)
    theirs["state"][1][NESTED]["absmax2"][5] = bad
    state = from_bitsandbytes(tx.init(params), theirs, params, ORDER)
    with pytest.raises(RAISES, match="kernel"):
        jax.block_until_ready(tx.update(params, state, params))


@pytest.mark.parametrize(
    ("names", "transposed", "message"),
    [
        (["['b']", "['kernel']"], (), r"does not say which parameter of bitsandbytes \['scale'\]"),
        ([*ORDER, "['x']"], (), r"names has \"\['x'\]\", which is no leaf"),
        ([*ORDER, "['b']"], (), r"names has \['b'\] twice"),
        ("['b']", (), "must be a sequence of names"),
        (ORDER, ["kernel"], "transposed has 'kernel', which is no leaf"),
        (ORDER, "['kernel']", "must be a collection of names"),
    ],
)
def test_bad_names_are_refused(names, transposed, message, params):
    tx = paged_optax.scale_by_paged_adam8bit(quantization=DYNAMIC)
    state = trained(tx, params)
    theirs = to_bitsandbytes(state, ORDER)
    with pytest.raises((ValueError, TypeError), match=message):
        from_bitsandbytes(tx.init(params), theirs, params, names, transposed=transposed)
    with pytest.raises((ValueError, TypeError), match=message):
        to_bitsandbytes(state, names, transposed=transposed)


def test_states_without_moments_are_refused(params):
    tx = paged_optax.scale_by_paged_adam8bit()
    with pytest.raises(ValueError, match="never updated"):
        to_bitsandbytes(tx.init(params), ORDER)
    two = optax.chain(tx, paged_optax.scale_by_paged_adam8bit())
    with pytest.raises(ValueError, match="found 2 paged states"):
        to_bitsandbytes(two.init(params), ORDER)
    theirs = to_bitsandbytes(trained(tx, params), ORDER)
    with pytest.raises(ValueError, match="moments of 1 paged states"):
        from_bitsandbytes(two.init(params), theirs, params, ORDER)
    with pytest.raises(TypeError, match="state_dict is a list"):
        from_bitsandbytes(tx.init(params), [1], params, ORDER)
    with pytest.raises(TypeError, match="state_dict is a dict"):
        from_bitsandbytes(tx.init(params), {"state": None}, params, ORDER)
    with pytest.raises(ValueError, match="params has no leaves"):
        from_bitsandbytes(tx.init(params), theirs, {}, [])
