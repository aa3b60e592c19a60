"""Two processes of one job (`jax.distributed`) train one sharded model."""

import jax
import numpy as np
import pytest

import processes

pytestmark = pytest.mark.slow

# Run by every process of several, or by one process with all devices, after what joins the job:
# this, and one of the programs below it.
START = """
    import numpy as np
    import jax.numpy as jnp
    import optax
    from jax.experimental import multihost_utils
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

    import paged_optax

    # No gradient needs a sum over devices, which one process and two would round differently.
    specs = {"kernel": P(None, "x"), "bias": P("x"), "scale": P()}
    shapes = {"kernel": (64, 1024), "bias": (1024,), "scale": (8192,)}
    tx = paged_optax.paged_adamw8bit(1e-2)

    def loss(params, x):
        hidden = jnp.tanh(x @ params["kernel"] + params["bias"])
        return jnp.mean(hidden**2) + jnp.mean(params["scale"] ** 2)

    def make_mesh(kind):
        devices = jax.devices()[:num_devices]
        return jax.make_mesh((num_devices,), ("x",), axis_types=(kind,), devices=devices)

    def make_inputs(mesh):
        rng = np.random.default_rng(0)

        def sharded(shape, spec):
            whole = rng.standard_normal(shape).astype(np.float32)
            sharding = NamedSharding(mesh, spec)
            return jax.make_array_from_callback(shape, sharding, lambda i: whole[i])

        params = {name: sharded(shape, specs[name]) for name, shape in shapes.items()}
        return params, sharded((16, 64), P())

    @jax.jit
    def step(params, state, x):
        grads = jax.grad(loss)(params, x)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def advance(params, state, x, steps):
        for _ in range(steps):
            params, state = step(params, state, x)
        return params, state

    def results(params, state):
        if count > 1:
            params = multihost_utils.process_allgather(params, tiled=True)
        moments = paged_optax.moments(state, gather=True)
        return {
            **{f"params/{name}": np.asarray(leaf) for name, leaf in params.items()},
            **{f"mu/{name}": leaf for name, leaf in moments.mu.items()},
            **{f"nu/{name}": leaf for name, leaf in moments.nu.items()},
        }

    def end_at_once(main):
        try:
            main()
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)  # at a regular exit a process waits for the other one
"""

TRAIN = """
    def train(kind):
        mesh = make_mesh(kind)
        if index == 1:  # a state of its own does not bring the shared ones out of step
            own = {"w": jnp.ones((64, 64))}
            _, state = tx.update(own, tx.init(own), own)
            assert paged_optax.moments(state).mu["w"].shape == (64, 64)
        with jax.set_mesh(mesh):
            params, x = make_inputs(mesh)
            return advance(params, jax.jit(tx.init)(params), x, 4)

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
        tokens = tokens.reshape(-1, 2)
        assert len(np.unique(tokens, axis=0)) == 1, tokens
        return results(params, state)

    @end_at_once
    def main():
        for kind in AxisType.Auto, AxisType.Explicit:
            np.savez(f"{folder}/{kind.name}-{count}-{index}.npz", **check(*train(kind)))
"""

# Saves in every way after 3 of 6 steps, or resumes there.
RESUME = """
    import orbax.checkpoint as ocp

    def save(params, state):
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(f"{folder}/orbax", {"params": params, "state": state})
        paged_optax.save_moments(state, f"{folder}/moments.safetensors")

    def restore(params, way):
        state = jax.jit(tx.init, out_shardings=NamedSharding(mesh, P()))(params)
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
            {"params": params, "state": state},
        )
        with ocp.StandardCheckpointer() as checkpointer:
            restored = checkpointer.restore(f"{folder}/orbax", shapes)
        if way == "file":
            state = paged_optax.load_moments(state, f"{folder}/moments.safetensors")
        else:
            state = restored["state"]
        return restored["params"], state

    phase, mesh = sys.argv[6], make_mesh(AxisType.Auto)

    @end_at_once
    def main():
        params, x = make_inputs(mesh)
        if phase == "save":
            params, state = advance(params, tx.init(params), x, 3)
            save(params, state)
            ends = {"save": advance(params, state, x, 3)}
        else:
            ends = {way: advance(*restore(params, way), x, 3) for way in ("orbax", "file")}
        for way, (params, state) in ends.items():
            assert int(state[0].count.addressable_shards[0].data) == 6
            np.savez(f"{folder}/{way}-{count}-{index}.npz", **results(params, state))
"""


def run(folder, platform, count, program=TRAIN, *arguments):
    """Runs a program in `count` processes, all of which must end well."""
    codes, texts = processes.run(START + program, folder, platform, count, *arguments)
    assert codes == [0] * count, "\n".join(texts)


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def results(request, tmp_path_factory):
    """The folder with what one process and two, of four CPU devices or two GPUs, came to."""
    platform = request.param
    if platform == "cuda" and len(jax.devices("gpu")) < 2:
        pytest.skip("there is only one GPU")
    folder = tmp_path_factory.mktemp(platform)
    for count in 1, 2:
        run(folder, platform, count)
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


@pytest.mark.parametrize("platform", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_two_processes_save_and_resume(platform, tmp_path):
    """In two processes again and in one: by Orbax and by a file of each process, to the bit."""
    pytest.importorskip("orbax.checkpoint")
    if platform == "cuda" and len(jax.devices("gpu")) < 2:
        pytest.skip("there is only one GPU")
    run(tmp_path, platform, 2, RESUME, "save")
    names = sorted(path.name for path in tmp_path.glob("moments*"))
    assert names == ["moments-00001-of-00002.safetensors", "moments-00002-of-00002.safetensors"]
    for count in 2, 1:
        run(tmp_path, platform, count, RESUME, "resume")
    expected = np.load(tmp_path / "save-2-0.npz")
    for name in "save-2-1", *(f"{way}-{end}" for way in ("orbax", "file") for end in ENDS):
        actual = np.load(tmp_path / f"{name}.npz")
        assert set(actual.files) == set(expected.files)
        for key in expected.files:
            np.testing.assert_array_equal(actual[key], expected[key], f"{name} {key}")


ENDS = ["2-0", "2-1", "1-0"]  # processes, and the index of one
