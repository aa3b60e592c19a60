"""JAX's persistent compilation cache: what one process compiled runs in the next."""

import json
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paged_optax import Quantization, moments, scale_by_paged_adam8bit

pytestmark = pytest.mark.slow

# Run twice. Prints, for each way to spread the state, how often a program was in the cache.
PROGRAM = """
    import collections
    import contextlib
    import json
    import sys

    import jax

    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_compilation_cache_dir", sys.argv[1])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    events = collections.Counter()
    jax.monitoring.register_event_listener(lambda name, **_: events.update([name]))

    import numpy as np
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

    from paged_optax import Quantization, moments, scale_by_paged_adam8bit

    def train(mesh):
        tx = scale_by_paged_adam8bit(quantization=Quantization("dynamic"))
        init, update = jax.jit(tx.init), jax.jit(tx.update)
        place = jax.devices()[0] if mesh is None else NamedSharding(mesh, P("x"))
        events.clear()
        for i in range(3):
            rng = np.random.default_rng(i)
            whole = {"w": rng.standard_normal((64, 1024)).astype(np.float32)}
            grads = jax.device_put(whole, place)
            state = init(grads) if i == 0 else state
            updates, state = update(grads, state)
        return np.asarray(updates["w"]), moments(state).mu["w"], moments(state).nu["w"]

    def make_mesh(kind):
        return jax.make_mesh((8,), ("x",), axis_types=(kind,))

    results, report = {}, {}
    for name, mesh in {
        "one device": None,
        "Explicit mesh": make_mesh(AxisType.Explicit),
        "Auto mesh": make_mesh(AxisType.Auto),
        "Auto mesh with option": make_mesh(AxisType.Auto),
    }.items():
        option = "option" in name
        jax.config.update("jax_remove_custom_partitioning_ptr_from_cache_key", option)
        with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
            results[name] = np.stack(train(mesh))
        report[name] = {
            kind: events[f"/jax/compilation_cache/cache_{kind}"] for kind in ("hits", "misses")
        }
        jax.clear_caches()
    np.savez(sys.argv[2], **results)
    print(json.dumps(report))
"""


def run(folder, name):
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), str(folder / "cache"), name],
        cwd=folder,  # not a checkout, whose source folder would be imported
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout), np.load(folder / name)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("persistent")
    return [run(folder, name) for name in ("first.npz", "second.npz")]


@pytest.fixture(scope="module")
def expected():
    """The same steps in this process, without a cache."""
    with jax.default_device(jax.devices("cpu")[0]):
        tx = scale_by_paged_adam8bit(quantization=Quantization("dynamic"))
        state = tx.init({"w": jnp.zeros((64, 1024))})
        for i in range(3):
            rng = np.random.default_rng(i)
            grads = {"w": jnp.asarray(rng.standard_normal((64, 1024)), jnp.float32)}
            updates, state = tx.update(grads, state)
        stored = moments(state)
        return np.stack([updates["w"], stored.mu["w"], stored.nu["w"]])


@pytest.mark.parametrize("where", ["one device", "Explicit mesh", "Auto mesh with option"])
def test_second_process_compiles_nothing(runs, expected, where):
    (first, first_results), (second, second_results) = runs
    assert first[where]["misses"] >= 2  # init and update
    assert second[where]["misses"] == 0
    assert second[where]["hits"] >= 2
    for results in (first_results, second_results):
        np.testing.assert_array_equal(results[where], expected)


def test_auto_mesh_without_the_option(runs, expected):
    """JAX's key of the cache then holds the address of a Python function: nothing is found."""
    (first, first_results), (second, second_results) = runs
    assert first["Auto mesh"]["misses"] >= 2
    assert sum(second["Auto mesh"].values()) >= 2
    for results in (first_results, second_results):
        np.testing.assert_array_equal(results["Auto mesh"], expected)
