"""A job of two processes, one of which is killed, is started again."""

import shutil

import jax
import numpy as np
import pytest

import processes

pytestmark = pytest.mark.endurance

# Trains for eight steps, from the last checkpoint if there is one, and saves at every second step.
# Process 1 kills itself after `killed_after` steps.
TRAINER = """
    import jax.numpy as jnp
    import numpy as np
    import optax
    import orbax.checkpoint as ocp
    from jax.experimental import multihost_utils
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

    import paged_optax

    checkpoints, name, killed_after = sys.argv[6], sys.argv[7], int(sys.argv[8])
    specs = {"w": P("x"), "bias": P("x"), "scale": P()}
    shapes = {"w": (64, 1024), "bias": (2048,), "scale": (8192,)}
    mesh = jax.make_mesh((num_devices,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices())
    tx = paged_optax.paged_adamw8bit(1e-2)

    def tree(seed):
        rng = np.random.default_rng(seed)
        whole = {k: rng.standard_normal(s).astype(np.float32) for k, s in shapes.items()}
        return {
            k: jax.make_array_from_callback(x.shape, NamedSharding(mesh, specs[k]), x.__getitem__)
            for k, x in whole.items()
        }

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def train(manager):
        params = tree(0)
        state = jax.jit(tx.init, out_shardings=NamedSharding(mesh, P()))(params)
        first = manager.latest_step() or 0
        if first:
            target = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
                {"params": params, "state": state},
            )
            paged_optax.release(state)
            restored = manager.restore(first, args=ocp.args.StandardRestore(target))
            params, state = restored["params"], restored["state"]
        print("starts after", first, flush=True)
        for i in range(first, 8):
            if i == killed_after and index == 1:
                os.kill(os.getpid(), 9)
            params, state = step(params, state, tree(1 + i))
            manager.save(i + 1, args=ocp.args.StandardSave({"params": params, "state": state}))
        return params, state

    try:
        options = ocp.CheckpointManagerOptions(save_interval_steps=2, max_to_keep=2)
        with jax.set_mesh(mesh), ocp.CheckpointManager(checkpoints, options=options) as manager:
            params, state = train(manager)
            moments = paged_optax.moments(state, gather=True)
        if count > 1:
            params = multihost_utils.process_allgather(params, tiled=True)
        found = {"params": params, "mu": moments.mu, "nu": moments.nu}
        leaves = jax.tree_util.tree_leaves_with_path(found)
        end = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
        np.savez(f"{folder}/{name}-{index}.npz", **end)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
"""


def run_all(*arguments):
    """Runs processes that all have to succeed; returns what they printed."""
    codes, texts = processes.run(TRAINER, *arguments)
    assert not any(codes), "\n".join(texts)
    return texts


@pytest.mark.parametrize("platform", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_killed_process_of_two(platform, tmp_path):
    """The job goes on from the last checkpoint, in two processes or in one, with the same bits."""
    pytest.importorskip("orbax.checkpoint")
    if platform == "cuda" and len(jax.devices("gpu")) < 2:
        pytest.skip("there is only one GPU")
    never = 99
    run_all(tmp_path, platform, 1, tmp_path / "other", "undisturbed", never)
    codes, texts = processes.run(TRAINER, tmp_path, platform, 2, tmp_path / "c", "killed", 5)
    assert codes[1] == -9 and codes[0] != 0, (codes, texts)
    shutil.copytree(tmp_path / "c", tmp_path / "copy")
    texts = run_all(tmp_path, platform, 2, tmp_path / "c", "two", never)
    texts += run_all(tmp_path, platform, 1, tmp_path / "copy", "one", never)
    assert not any("starts after 0" in text for text in texts), texts
    expected = np.load(tmp_path / "undisturbed-0.npz")
    assert len(expected.files) == 9
    for name in "two-0", "two-1", "one-0":
        actual = np.load(tmp_path / f"{name}.npz")
        for key in expected.files:
            np.testing.assert_array_equal(actual[key], expected[key], f"{name} {key}")
