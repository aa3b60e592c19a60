"""Moments are saved and come back: a run that is resumed ends where an uninterrupted one ends."""

import copy
import gc
import inspect
import pickle
import resource
import signal
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import checkpoints
import paged_optax
from checkpoints import DYNAMIC
from helpers import (
    RAISES,
    assert_trees_equal,
    finish,
    make_tree,
    num_unused,
    run_python,
    set_available_host_bytes,
    to_jax,
)
from paged_optax import Quantization, load_moments, moments, save_moments

# --- Resuming in another process ----------------------------------------------------------------

HALF_IN_A_PROCESS = """
    import sys
    import jax
    import checkpoints
    folder, half, names, ways, shape, saved_at = sys.argv[1:]
    mesh = None
    if shape:
        x, y = map(int, shape.split("x"))
        jax.config.update("jax_num_cpu_devices", x * y)
        kinds = (jax.sharding.AxisType.Auto,) * 2
        mesh = jax.make_mesh((x, y), ("x", "y"), axis_types=kinds)
    ways = {way: checkpoints.ALL_WAYS[way] for way in ways.split()}
    half = getattr(checkpoints, half)
    wrong = [half(folder, name, ways, mesh, int(saved_at)) or [] for name in names.split()]
    print("wrong", sum(wrong, []))
"""


def run_half(folder, half, names, ways=checkpoints.WAYS, mesh="", saved_at=checkpoints.HALF):
    """Halves of runs in a process of their own; what resumed there and ended elsewhere."""
    process = run_python(
        HALF_IN_A_PROCESS, folder, folder, half, names, " ".join(ways), mesh, saved_at
    )
    (line,) = [x for x in process.stdout.splitlines() if x.startswith("wrong")]
    return line


def assert_resumes(folder, name, ways=checkpoints.WAYS, mesh="", saved_at=checkpoints.HALF):
    for half in ("first_half", "second_half"):
        line = run_half(folder, half, name, ways, mesh, saved_at)
    assert line == "wrong []"


@pytest.fixture(scope="module")
def wrong_in_a_new_process(tmp_path_factory):
    """All runs in two processes: starting one takes longer than a run in it."""
    folder = tmp_path_factory.mktemp("runs")
    run_half(folder, "first_half", " ".join(checkpoints.RUNS))
    return run_half(folder, "second_half", " ".join(checkpoints.RUNS))


@pytest.mark.parametrize("name", checkpoints.RUNS)
def test_resume_in_a_new_process(name, wrong_in_a_new_process):
    assert wrong_in_a_new_process.startswith("wrong [")
    assert f"'{name} " not in wrong_in_a_new_process


@pytest.mark.parametrize("name", ["ratio", "ratio6", "ratio4", "compensated"])
def test_resume_on_a_mesh(name, tmp_path):
    assert_resumes(tmp_path, name, mesh="4x2")


def test_state_that_was_never_updated(tmp_path):
    ways = {k: v for k, v in checkpoints.WAYS.items() if k != "file_abstract"}
    assert_resumes(tmp_path, "ratio", ways, saved_at=0)


def test_orbax(tmp_path):
    assert_resumes(tmp_path, "partition", checkpoints.ORBAX_WAYS)


def test_orbax_on_a_mesh(tmp_path):
    ways = {k: v for k, v in checkpoints.ORBAX_WAYS.items() if "linen" not in k}
    assert_resumes(tmp_path, "ratio", ways, mesh="4x2")


def test_orbax_with_a_state_that_was_never_updated(tmp_path):
    assert_resumes(tmp_path, "ratio", checkpoints.ORBAX_WAYS, saved_at=0)


def test_orbax_without_room_for_a_copy(tmp_path, monkeypatch):
    """The moments are written before Orbax's `save` returns, whichever of its APIs is called."""
    pytest.importorskip("orbax.checkpoint")
    set_available_host_bytes(monkeypatch, 0)
    checkpoints.first_half(tmp_path, "ratio", checkpoints.ORBAX_WAYS)
    assert not list(tmp_path.rglob(".paged_optax-*"))
    assert run_half(tmp_path, "second_half", "ratio", checkpoints.ORBAX_WAYS) == "wrong []"


def test_process_that_ends_during_the_first_step(tmp_path):
    """XLA's thread, which gives arrays of Python back, must not wait for its interpreter."""
    code = """
        import jax, jax.numpy as jnp, paged_optax
        tx = paged_optax.scale_by_paged_adam8bit()
        params = {str(i): jnp.ones((64, 64)) for i in range(200)}
        _, state = tx.update(params, tx.init(params))
        arrays = paged_optax.export_moments(state)
        state = paged_optax.import_moments(tx.init(params), arrays)
        del arrays
        step = jax.jit(tx.update).lower(params, state).compile()
        step(params, state)
    """
    for _ in range(2):
        run_python(code, tmp_path)


def test_orbax_has_what_we_wrap():
    """Fails when Orbax changes what `paged_optax._orbax` stands on."""
    ocp = pytest.importorskip("orbax.checkpoint")
    for cls in (ocp.type_handlers.ArrayHandler, ocp.type_handlers.NumpyHandler):
        for name in ("serialize", "deserialize"):
            method = vars(cls)[name]
            assert method._is_of_paged_optax
            parameters = list(inspect.signature(method.__wrapped__).parameters)
            middle = ["values"] if name == "serialize" else []
            assert parameters == ["self", *middle, "infos", "args"]
    assert issubclass(ocp.type_handlers.SingleReplicaArrayHandler, ocp.type_handlers.ArrayHandler)
    assert callable(ocp.future.CommitFutureAwaitingContractedSignals)
    assert {"name", "parent_dir"} <= set(inspect.signature(ocp.type_handlers.ParamInfo).parameters)


def test_orbax_without_the_hook(tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    tx = paged_optax.scale_by_paged_adam8bit()
    params = {"w": jnp.ones(300)}
    _, state = tx.update(params, tx.init(params))
    paged_optax.use_orbax_hook(False)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "c", {"opt": state})
    finally:
        paged_optax.use_orbax_hook(True)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_orbax_refuses_to_save_a_state_that_is_not_the_newest(tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    tx = paged_optax.scale_by_paged_adam8bit()
    params = {"w": jnp.ones(300)}
    states = [tx.update(params, tx.init(params))[1]]
    for _ in range(2):
        states.append(jax.block_until_ready(tx.update(params, states[-1])[1]))
    with (
        ocp.StandardCheckpointer() as checkpointer,
        pytest.raises(RuntimeError, match="not the newest"),
    ):
        checkpointer.save(tmp_path / "c", {"opt": states[0]})
    # Orbax has begun nothing: no thread waits for folders that nobody makes.
    names = {thread.name for thread in threading.enumerate()}
    assert not names & {"serialize_shardings", "array_type_handler"}


@pytest.mark.parametrize("first", ["paged_optax", "orbax.checkpoint, flax.serialization"])
def test_import_order(first, tmp_path):
    code = f"""
        import sys
        import {first}
        assert "paged_optax" not in "{first}" or "orbax.checkpoint" not in sys.modules
        import paged_optax, orbax.checkpoint, flax.serialization
        from orbax.checkpoint.type_handlers import ArrayHandler
        assert ArrayHandler.serialize._is_of_paged_optax
        assert any(t.__name__ == "Token" for t in flax.serialization._STATE_DICT_REGISTRY)
    """
    run_python(code, tmp_path)


# --- In one process -----------------------------------------------------------------------------

SHAPES = {"b": (7,), "w": (64, 80)}


@pytest.fixture
def params():
    return to_jax(make_tree(0, SHAPES))


@pytest.fixture
def tx():
    return paged_optax.paged_adamw8bit(1e-2)


def run(tx, params, state, first, count):
    update = jax.jit(tx.update)
    for i in range(first, first + count):
        grads = to_jax(make_tree(100 + i, {k: p.shape for k, p in params.items()}))
        updates, state = update(grads, state, params)
        params = jax.block_until_ready(optax.apply_updates(params, updates))
    return params, state


@pytest.fixture
def trained(tx, params):
    return run(tx, params, tx.init(params), 0, 3)


def test_deepcopy_is_a_second_state(tx, trained):
    params, state = trained
    other = copy.deepcopy(state)
    one, two = run(tx, params, state, 3, 2), run(tx, params, other, 3, 2)
    assert_trees_equal(one[0], two[0])
    assert_trees_equal(moments(one[1]), moments(two[1]))


@pytest.mark.parametrize("way", ["orbax", "file"])
def test_a_fresh_state_that_was_restored_onto_leaves_nothing(tx, trained, tmp_path, way):
    """Each later step on a GPU would wait for the device otherwise."""
    ocp = pytest.importorskip("orbax.checkpoint") if way == "orbax" else None
    params, state = trained
    fresh = jax.block_until_ready(tx.init(params))
    assert num_unused() == 1
    if ocp is None:
        save_moments(state, tmp_path / "moments")
        restored = load_moments(fresh, tmp_path / "moments")
    else:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "c", {"opt": state})
            checkpointer.wait_until_finished()
            restored = checkpointer.restore(tmp_path / "c", {"opt": fresh})["opt"]
    del fresh
    gc.collect()
    assert num_unused() > 0  # the restored one, at least
    one, two = run(tx, params, state, 3, 2), run(tx, params, restored, 3, 2)
    assert num_unused() == 0
    assert_trees_equal(one[0], two[0])


def test_restored_state_is_saved_again_before_its_first_step(tx, trained, tmp_path):
    params, state = trained
    for i in range(3):
        save_moments(state, tmp_path / f"{i}.safetensors")
        state = load_moments(tx.init(params), tmp_path / f"{i}.safetensors")
    state = pickle.loads(pickle.dumps(state))
    state = paged_optax.import_moments(tx.init(params), paged_optax.export_moments(state))
    expected, actual = run(tx, params, trained[1], 3, 2), run(tx, params, state, 3, 2)
    assert_trees_equal(actual[0], expected[0])


@pytest.mark.parametrize(
    "call, after",
    [
        ("builtins.open", 0),
        ("os.fsync", 0),
        ("os.replace", 0),
        ("os.open", 0),
        ("os.open", 1),
        ("os.fsync", 1),
    ],
)
def test_saving_that_fails_leaves_a_whole_file(tx, trained, tmp_path, monkeypatch, call, after):
    """The old one until the new one has its name, and then the new one, in case of a crash."""
    params, state = trained
    path = tmp_path / "m.safetensors"
    save_moments(state, path)
    before = path.read_bytes()
    expected, state = run(tx, params, state, 3, 1)
    save_moments(state, tmp_path / "other")
    complete = (tmp_path / "other").read_bytes()
    (tmp_path / "other").unlink()
    module, name = call.split(".")
    works, calls = getattr(__import__(module), name), iter(range(100))

    def fails(*args, **kwargs):
        if threading.current_thread() is threading.main_thread() and next(calls) == after:
            raise OSError(28, "No space left on device")
        return works(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(call, fails)
        with pytest.raises(OSError, match="No space left"):
            save_moments(state, path)
    has_its_name = after == 1
    assert path.read_bytes() == (complete if has_its_name else before)
    assert [file.name for file in tmp_path.iterdir()] == ["m.safetensors"]
    save_moments(state, path)  # the state is as it was
    assert path.read_bytes() == complete


def test_a_disk_that_is_full_while_moments_are_written(tx, trained, tmp_path):
    """Every write may be the one that fails, by the system's own limit of a file's size."""
    path = tmp_path / "m.safetensors"
    nbytes = save_moments(trained[1], path)
    before = path.read_bytes()
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    was = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for limit in range(0, nbytes, max(1, nbytes // 20)):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
            with pytest.raises(OSError, match="too large"):
                save_moments(trained[1], path)
            assert path.read_bytes() == before
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, was)
    assert [file.name for file in tmp_path.iterdir()] == ["m.safetensors"]


def test_file_is_safetensors(trained, tmp_path):
    safetensors = pytest.importorskip("safetensors")
    path = tmp_path / "m.safetensors"
    assert save_moments(trained[1], path) == path.stat().st_size
    arrays = paged_optax.export_moments(trained[1])
    del arrays["paged_optax"]
    with safetensors.safe_open(path, "np") as file:
        assert set(file.keys()) == {*arrays, "crc32"}
        for name, array in arrays.items():
            np.testing.assert_array_equal(file.get_tensor(name), array)


def test_state_that_is_not_the_newest_is_not_saved(tx, params, tmp_path):
    first = run(tx, params, tx.init(params), 0, 1)[1]
    second = jax.block_until_ready(run(tx, params, first, 1, 1)[1])
    with pytest.raises(RuntimeError, match="not the newest"):
        save_moments(first, tmp_path / "m.safetensors")
    paged_optax.release(second)
    with pytest.raises(RuntimeError, match="released"):
        save_moments(second, tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


def test_number_of_states(tx, trained, tmp_path):
    params, state = trained
    save_moments(state, tmp_path / "m.safetensors")
    two = optax.chain(tx, paged_optax.scale_by_paged_adam8bit())
    with pytest.raises(
        ValueError, match="moments of 1 paged states, and the optimizer state has 2"
    ):
        load_moments(two.init(params), tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="no paged optimizer state"):
        load_moments(optax.adam(0.1).init(params), tmp_path / "m.safetensors")


OTHERS = {
    "shape": ({"b": (7,), "w": (64, 81)}, {}),
    "name": ({"b": (7,), "v": (64, 80)}, {}),
    "fewer": ({"b": (7,)}, {}),
    "format": (SHAPES, {"quantization": Quantization("dynamic")}),
    "rounding": (SHAPES, {"param_rounding": "compensated"}),
}


@pytest.mark.parametrize("case", OTHERS)
def test_first_step_compares(case, trained, tmp_path):
    save_moments(trained[1], tmp_path / "m.safetensors")
    shapes, options = OTHERS[case]
    params = to_jax(make_tree(0, shapes))
    if case == "rounding":
        params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    tx = paged_optax.paged_adamw8bit(1e-2, **options)
    state = load_moments(tx.init(params), tmp_path / "m.safetensors")
    with pytest.raises(RAISES, match="restored from a checkpoint"):
        finish(tx.update(params, state, params))


def test_other_rule_is_refused(trained, params, tmp_path):
    save_moments(trained[1], tmp_path / "m.safetensors")
    tx = paged_optax.paged_lion8bit(1e-2)
    state = load_moments(tx.init(params), tmp_path / "m.safetensors")
    with pytest.raises(RAISES, match="restored from a checkpoint"):
        finish(tx.update(params, state, params))


def test_a_donated_state_shows_where_moments_go(tx, trained, tmp_path):
    """Only its structure counts, and that is there after a step that failed."""
    params, state = trained
    save_moments(state, tmp_path / "m.safetensors")
    lost = tx.init(params)
    jax.block_until_ready(jax.jit(tx.update, donate_argnums=1)(params, lost, params))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(lost))
    found = load_moments(lost, tmp_path / "m.safetensors")
    assert_trees_equal(moments(found), moments(state))


def test_convert_between_formats(trained, tmp_path):
    params, state = trained
    save_moments(state, tmp_path / "m.safetensors")
    tx = paged_optax.paged_adamw8bit(1e-2, quantization=Quantization(min_size=2**62))
    exact = moments(state)
    other = load_moments(tx.init(params), tmp_path / "m.safetensors", convert=True)
    zeros = jax.tree.map(jnp.zeros_like, params)
    _, other = tx.update(zeros, other, params)  # a gradient of zero leaves 0.9 and 0.999 of them
    np.testing.assert_allclose(moments(other).mu["w"], 0.9 * exact.mu["w"], rtol=1e-6)
    np.testing.assert_allclose(moments(other).nu["w"], 0.999 * exact.nu["w"], rtol=1e-6)


def test_optax_and_back(tx, trained):
    params, state = trained
    as_optax = paged_optax.to_optax(state)
    adamw = optax.adamw(1e-2)
    assert jax.tree.structure(as_optax) == jax.tree.structure(adamw.init(params))
    assert_trees_equal(as_optax[0].mu, moments(state).mu)
    back = paged_optax.from_optax(tx.init(params), as_optax)
    grads = to_jax(make_tree(7, SHAPES))
    with jax.numpy_dtype_promotion("standard"):
        expected, _ = adamw.update(grads, as_optax, params)
    actual, after = tx.update(grads, back, params)
    assert int(after[0].count) == 4
    for name in SHAPES:
        np.testing.assert_allclose(actual[name], expected[name], rtol=0.1, atol=2e-4)


# --- Other devices, other versions ---------------------------------------------------------------

LEAVES = {"rows": (64, 256), "columns": (40, 160), "vector": (4096,), "everywhere": (33, 40)}
SPECS = {"rows": P("x"), "columns": P(None, "x"), "vector": P("x"), "everywhere": P()}


def make_on(num_devices):
    """Parameters on a mesh of the first devices, or on one."""
    params = to_jax(make_tree(3, LEAVES))
    if num_devices == 1:
        return params
    mesh = jax.make_mesh(
        (num_devices,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:num_devices]
    )
    return {k: jax.device_put(v, NamedSharding(mesh, SPECS[k])) for k, v in params.items()}


@pytest.mark.parametrize("codec", ["ratio", "ratio6", "ratio4", "dynamic"])
def test_other_numbers_of_devices(codec, tmp_path):
    """8 -> 4 -> 1 -> 2: blocks that coincide keep their bits, others are rounded once each time."""
    quantization = Quantization(codec, min_size=0)
    tx = paged_optax.paged_adam8bit(1e-2, non_finite="skip_step", quantization=quantization)
    params = make_on(8)
    update = jax.jit(tx.update)
    state = tx.init(params)
    for i in range(3):
        grads = {k: jax.device_put(g, params[k].sharding) for k, g in make_tree(i, LEAVES).items()}
        _, state = update(grads, state, params)
    first = previous = moments(state)
    for hop, num_devices in enumerate((4, 1, 2)):
        save_moments(state, tmp_path / f"{hop}.safetensors")
        params = make_on(num_devices)
        state = load_moments(tx.init(params), tmp_path / f"{hop}.safetensors")
        skipped = jax.tree.map(lambda p: jnp.full_like(p, jnp.nan), params)  # changes nothing
        _, state = update(skipped, state, params)
        now = moments(state)
        for name in ("rows", "vector", "everywhere"):
            np.testing.assert_array_equal(now.mu[name], first.mu[name])
            np.testing.assert_array_equal(now.nu[name], first.nu[name])
        pairs = [(x.mu["columns"], x.nu["columns"]) for x in (previous, now)]
        checkpoints.check_rounded_once(codec, *pairs, params["columns"])
        previous = now
    expected = {k: np.asarray(v) for k, v in make_tree(9, LEAVES).items()}
    _, state = update(to_jax(expected), state, params)  # and training goes on
    assert int(optax.tree.get(state, "count")) == 4


GOLDEN = Path(__file__).parent / "golden"


def golden_run():
    """The optimizers, parameters and state of the golden file."""
    half = jnp.bfloat16
    parts = {
        "ratio": (paged_optax.scale_by_paged_adam8bit(), jnp.float32),
        "dynamic": (paged_optax.scale_by_paged_lion8bit(quantization=DYNAMIC), jnp.float32),
        "master": (paged_optax.paged_adam8bit(1e-3, param_rounding="compensated"), half),
    }
    shapes = {"b": (7,), "cut": (64, 80), "scalar": ()}
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    spec = {"b": P(), "cut": P("x"), "scalar": P()}
    params, states = {}, {}
    for name, (tx, dtype) in parts.items():
        params[name] = {
            k: jax.device_put(v.astype(dtype), NamedSharding(mesh, spec[k]))
            for k, v in to_jax(make_tree(5, shapes)).items()
        }
        states[name] = tx.init(params[name])
        for _ in range(2):
            _, states[name] = jax.jit(tx.update)(params[name], states[name], params[name])
    return {name: tx for name, (tx, _) in parts.items()}, params, states


def write_golden():
    """How the files were made; they are not made again, so that later versions read them."""
    _, _, states = golden_run()
    save_moments(states, GOLDEN / "moments-1.safetensors")
    arrays = {}
    for name, state in states.items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(moments(state)._asdict()):
            arrays[f"{name}{jax.tree_util.keystr(path)}"] = leaf
    np.savez_compressed(GOLDEN / "moments-1.npz", **arrays)


def test_file_of_the_first_version():
    """Every version reads it: onto other devices, with the values that it had, and goes on."""
    txs, params, states = golden_run()
    one = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), params)
    fresh = {name: tx.init(one[name]) for name, tx in txs.items()}
    for targets, values in ((states, params), (fresh, one)):
        loaded = load_moments(targets, GOLDEN / "moments-1.safetensors")
        with np.load(GOLDEN / "moments-1.npz") as arrays:
            for name, state in loaded.items():
                found = moments(state)._asdict()
                for path, leaf in jax.tree_util.tree_leaves_with_path(found):
                    key = f"{name}{jax.tree_util.keystr(path)}"
                    np.testing.assert_array_equal(leaf, arrays[key])
        for name, tx in txs.items():
            _, state = jax.jit(tx.update)(values[name], loaded[name], values[name])
            assert int(optax.tree.get(state, "count")) == 3
