"""One update spread over eight CPU devices, in a process of its own."""

import os
import subprocess
import sys
import textwrap

import pytest

PROGRAM = """
    import jax, jax.numpy as jnp, numpy as np, optax, paged_optax
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

    SPECS = {"rows": P("x"), "both": P("x", "y"), "replicated": P()}
    SHAPES = {"rows": (512, 1024), "both": (1024, 512), "replicated": (64,)}

    def train(mesh):
        rng = np.random.default_rng(0)

        def tree():
            arrays = {k: rng.standard_normal(s).astype(np.float32) for k, s in SHAPES.items()}
            if mesh is None:
                return arrays
            return {k: jax.device_put(v, NamedSharding(mesh, SPECS[k])) for k, v in arrays.items()}

        tx = paged_optax.paged_adamw8bit(1e-2)
        params = tree()
        state = jax.jit(tx.init)(params)

        @jax.jit
        def step(params, state, grads):
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        for _ in range(3):
            grads = tree()
            params, state = step(params, state, grads)
        return params, state, step.lower(params, state, grads).compile().as_text()

    expected, _, _ = train(None)
    MESH = jax.make_mesh((4, 2), ("x", "y"), axis_types=(KIND,) * 2)
    with jax.set_mesh(MESH):
        params, state, program = train(MESH)
    for name in SHAPES:  # every shard of these shapes has whole blocks
        np.testing.assert_array_equal(np.asarray(params[name]), np.asarray(expected[name]))
        wanted = NamedSharding(MESH, SPECS[name])
        assert params[name].sharding.is_equivalent_to(wanted, params[name].ndim)
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert collective not in program
    assert len(paged_optax.memory_report(state).devices) == 8
"""

MANY_INITS = """
    import jax, jax.numpy as jnp, numpy as np, paged_optax
    from jax.sharding import NamedSharding, PartitionSpec as P

    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    tx = paged_optax.scale_by_paged_adam8bit()
    params = jax.device_put(jnp.ones((64, 64)), NamedSharding(mesh, P("x")))
    for _ in range(20):
        states = jax.jit(lambda p: [tx.init(p @ p * i) for i in range(8)])(params)
        tokens = [[tuple(np.asarray(s.data)) for s in state.token.addressable_shards]
                  for state in states]
        assert all(len(set(token)) == 1 for token in tokens), tokens
        assert len({token[0] for token in tokens}) == 8
"""


def run(tmp_path, program):
    flags = "--xla_force_host_platform_device_count=8"
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=tmp_path,  # not a checkout, whose source folder would be imported
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_shards_are_updated_where_they_are(tmp_path, kind):
    run(tmp_path, PROGRAM.replace("KIND", f"AxisType.{kind}"))


def test_states_made_in_one_program_have_one_handle_on_all_devices(tmp_path):
    run(tmp_path, MANY_INITS)
