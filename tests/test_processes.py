"""Two processes of one job (`jax.distributed`) train one sharded model."""

import os
import socket
import subprocess
import sys
import textwrap

import numpy as np
import pytest

pytestmark = pytest.mark.slow

# Run by each process, and once more by one process with all devices.
PROGRAM = """
    import sys

    import jax
    import numpy as np

    index, count, port, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    jax.config.update("jax_num_cpu_devices", 4 // count)
    if count > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"localhost:{port}", count, index)

    import jax.numpy as jnp
    import optax
    from jax.experimental import multihost_utils
    from jax.sharding import NamedSharding, PartitionSpec as P

    import paged_optax

    mesh = jax.make_mesh((4,), ("x",), axis_types=(getattr(jax.sharding.AxisType, sys.argv[5]),))
    # No gradient needs a sum over devices, which one process and two would round differently.
    specs = {"kernel": P(None, "x"), "bias": P("x"), "scale": P()}
    rng = np.random.default_rng(0)

    def sharded(shape, spec):
        whole = rng.standard_normal(shape).astype(np.float32)
        return jax.make_array_from_callback(shape, NamedSharding(mesh, spec), lambda i: whole[i])

    def tree():
        shapes = {"kernel": (64, 1024), "bias": (1024,), "scale": (8192,)}
        return {name: sharded(shape, specs[name]) for name, shape in shapes.items()}

    tx = paged_optax.paged_adamw8bit(1e-2)
    if index == 1:  # a state of its own does not bring the shared ones out of step
        own = {"w": jnp.ones((64, 64))}
        _, state = tx.update(own, tx.init(own), own)
        assert paged_optax.moments(state).mu["w"].shape == (64, 64)

    def loss(params, x):
        hidden = jnp.tanh(x @ params["kernel"] + params["bias"])
        return jnp.mean(hidden**2) + jnp.mean(params["scale"] ** 2)

    @jax.jit
    def step(params, state, x):
        grads = jax.grad(loss)(params, x)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    with jax.set_mesh(mesh):
        params = tree()
        state = jax.jit(tx.init)(params)
        x = sharded((16, 64), P())
        for _ in range(4):
            params, state = step(params, state, x)

    tokens = np.concatenate([np.asarray(s.data) for s in state[0].token.addressable_shards])
    report = paged_optax.memory_report(state)
    assert len(report.devices) == 4 // count
    if count > 1:
        tokens = multihost_utils.process_allgather(tokens)
        try:
            paged_optax.moments(state)
        except RuntimeError as error:
            assert "belong to other processes" in str(error), error
        else:
            raise AssertionError("moments() returned part of the moments")
        params = multihost_utils.process_allgather(params, tiled=True)
    tokens = tokens.reshape(-1, 2)
    assert len(np.unique(tokens, axis=0)) == 1, tokens
    np.savez(f"{folder}/{count}-{index}.npz", **jax.tree.map(np.asarray, params))
"""


def run(folder, kind, count):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(PROGRAM), str(index), str(count), str(port)]
            + [str(folder), kind],
            cwd=folder,  # not a checkout, whose source folder would be imported
            env={**environment, "JAX_PLATFORMS": "cpu"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]
    try:
        errors = [process.communicate(timeout=240)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * count, "\n".join(errors)
    return [np.load(folder / f"{count}-{index}.npz") for index in range(count)]


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_two_processes_agree_with_one(tmp_path, kind):
    (expected,) = run(tmp_path, kind, 1)
    for params in run(tmp_path, kind, 2):
        for name in expected.files:
            np.testing.assert_array_equal(params[name], expected[name], name)
