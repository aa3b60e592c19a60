"""Two processes of one job (`jax.distributed`) train one sharded model."""

import shutil

import jax
import numpy as np
import pytest

import processes

pytestmark = pytest.mark.slow

# Run by each process, and once more by one process with all devices.
PROGRAM = """
    import jax.numpy as jnp
    import numpy as np
    import optax
    from jax.experimental import multihost_utils
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

    import paged_optax

    # No gradient needs a sum over devices, which one process and two would round differently.
    specs = {"kernel": P(None, "x"), "bias": P("x"), "scale": P()}
    shapes = {"kernel": (64, 1024), "bias": (1024,), "scale": (8192,)}

    def loss(params, x):
        hidden = jnp.tanh(x @ params["kernel"] + params["bias"])
        return jnp.mean(hidden**2) + jnp.mean(params["scale"] ** 2)

    def train(kind):
        devices = jax.devices()[:num_devices]
        mesh = jax.make_mesh((num_devices,), ("x",), axis_types=(kind,), devices=devices)
        rng = np.random.default_rng(0)
        tx = paged_optax.paged_adamw8bit(1e-2)

        def sharded(shape, spec):
            whole = rng.standard_normal(shape).astype(np.float32)
            sharding = NamedSharding(mesh, spec)
            return jax.make_array_from_callback(shape, sharding, lambda i: whole[i])

        if index == 1:  # a state of its own does not bring the shared ones out of step
            own = {"w": jnp.ones((64, 64))}
            _, state = tx.update(own, tx.init(own), own)
            assert paged_optax.moments(state).mu["w"].shape == (64, 64)

        @jax.jit
        def step(params, state, x):
            grads = jax.grad(loss)(params, x)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        with jax.set_mesh(mesh):
            params = {name: sharded(shape, specs[name]) for name, shape in shapes.items()}
            state = jax.jit(tx.init)(params)
            x = sharded((16, 64), P())
            for _ in range(4):
                params, state = step(params, state, x)
        return params, state

    def check(params, state):
        shards = state[0].token.value.addressable_shards
        tokens = np.concatenate([np.asarray(shard.data) for shard in shards])
        report = paged_optax.memory_report(state)
        assert len(report.devices) == num_devices // count
        assert report.elsewhere == (count - 1) * report.total, report
        assert ("elsewhere" in str(report)) == (count > 1), report
        if count > 1:
            tokens = multihost_utils.process_allgather(tokens)
            try:
                paged_optax.moments(state)
            except RuntimeError as error:
                assert "belong to other processes; to collect theirs" in str(error), error
            else:
                raise AssertionError("moments() returned part of the moments")
            params = multihost_utils.process_allgather(params, tiled=True)
        tokens = tokens.reshape(-1, 2)
        assert len(np.unique(tokens, axis=0)) == 1, tokens
        moments = paged_optax.moments(state, gather=True)
        return {
            **{f"params/{name}": np.asarray(leaf) for name, leaf in params.items()},
            **{f"mu/{name}": leaf for name, leaf in moments.mu.items()},
            **{f"nu/{name}": leaf for name, leaf in moments.nu.items()},
        }

    try:
        for kind in AxisType.Auto, AxisType.Explicit:
            np.savez(f"{folder}/{kind.name}-{count}-{index}.npz", **check(*train(kind)))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # at a regular exit a process waits for the other one
"""


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def platform(request):
    """Four CPU devices or two GPUs."""
    if request.param == "cuda" and len(jax.devices("gpu")) < 2:
        pytest.skip("there is only one GPU")
    return request.param


def run_all(program, folder, platform, count, *arguments):
    """Runs a program in processes that all have to succeed; returns what they printed."""
    codes, texts = processes.run(program, folder, platform, count, *arguments)
    assert codes == [0] * count, "\n".join(texts)
    return texts


@pytest.fixture(scope="module")
def results(platform, tmp_path_factory):
    """The folder with what one process and two came to."""
    folder = tmp_path_factory.mktemp(platform)
    for count in 1, 2:
        run_all(PROGRAM, folder, platform, count)
    return folder


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_two_processes_agree_with_one(results, kind):
    """Parameters and moments, to the bit; tokens are equal everywhere."""
    expected = np.load(results / f"{kind}-1-0.npz")
    assert len(expected.files) == 9
    for index in range(2):
        actual = np.load(results / f"{kind}-2-{index}.npz")
        for name in expected.files:
            np.testing.assert_array_equal(actual[name], expected[name], name)


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


def test_a_killed_process_of_two(platform, tmp_path):
    """The job goes on from the last checkpoint, in two processes or in one, with the same bits."""
    pytest.importorskip("orbax.checkpoint")
    never = 99
    run_all(TRAINER, tmp_path, platform, 1, tmp_path / "other", "undisturbed", never)
    codes, texts = processes.run(TRAINER, tmp_path, platform, 2, tmp_path / "c", "killed", 5)
    assert codes[1] == -9 and codes[0] != 0, (codes, texts)
    shutil.copytree(tmp_path / "c", tmp_path / "copy")
    texts = run_all(TRAINER, tmp_path, platform, 2, tmp_path / "c", "two", never)
    texts += run_all(TRAINER, tmp_path, platform, 1, tmp_path / "copy", "one", never)
    assert not any("starts after 0" in text for text in texts), texts
    expected = np.load(tmp_path / "undisturbed-0.npz")
    assert len(expected.files) == 9
    for name in "two-0", "two-1", "one-0":
        actual = np.load(tmp_path / f"{name}.npz")
        for key in expected.files:
            np.testing.assert_array_equal(actual[key], expected[key], f"{name} {key}")
