"""The QLoRA example on several devices: the same base, losses and answers, in shards."""

import functools
import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

for module in "matplotlib", "orbax.checkpoint", "psutil", "safetensors", "tqdm":
    pytest.importorskip(module)
import hf_checkpoint  # noqa: E402
import llama  # noqa: E402
import qlora  # noqa: E402
import sharding  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402

import paged_optax  # noqa: E402
import processes  # noqa: E402
from test_hf_checkpoint import HF, write  # noqa: E402
from test_qlora import Tokenizer, chat  # noqa: E402

COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
# Two devices share rows of most arrays. Four can share only columns of codes and scales.
WIDE = HF | {"hidden_size": 128, "intermediate_size": 384}
DYNAMIC = paged_optax.Quantization("dynamic")  # without random bits, which depend on the cuts


@pytest.fixture(autouse=True)
def as_users_run_it(standard_promotion):
    """optax's schedules need it."""


def mesh_of(count):
    return jax.set_mesh(sharding.make_mesh(count))


def load(folder, kind="nf4"):
    base = hf_checkpoint.load(folder, kind, show_progress=False)
    return jax.block_until_ready(base)


def bits_of(tree):
    return {
        jax.tree_util.keystr(path): np.asarray(x).view(np.uint8)
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


slow = pytest.mark.slow
KINDS = ["nf4-double", pytest.param("nf4", marks=slow), pytest.param("plain", marks=slow)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_has_the_same_bits_on_any_number_of_devices(kind, tmp_path):
    write(tmp_path, WIDE)
    expected = bits_of(load(tmp_path, kind)[1])
    for count in 2, 4:
        with mesh_of(count):
            base = load(tmp_path, kind)[1]
        actual = bits_of(base)
        assert actual.keys() == expected.keys()
        for name, bits in expected.items():
            np.testing.assert_array_equal(actual[name], bits, f"{name} on {count} devices")
        shares = {
            jax.tree_util.keystr(path): x.size / x.addressable_shards[0].data.size
            for path, x in jax.tree_util.tree_leaves_with_path(base)
        }
        spared = [name for name, share in shares.items() if share != count]
        # Groups of 256 quantized scales lie along the columns, so four devices cannot share these.
        assert bool(spared) == (kind == "nf4-double" and count == 4), spared


# --------------------------------------------------------------------------- one step of training


CONFIG = llama.SHAPES["tiny"]


def model():
    """A random base in NF4, and adapters that change something: arrays of NumPy."""
    rng = np.random.default_rng(0)

    def fill(x):
        if x.dtype == np.uint8:
            return rng.integers(256, size=x.shape, dtype=np.uint8)
        return (0.1 * rng.standard_normal(x.shape)).astype(x.dtype)

    def shapes(key):
        return llama.random_base(key, CONFIG, True), llama.init_lora(key, CONFIG, 4)

    return jax.tree.map(fill, jax.eval_shape(shapes, jax.random.key(0)))


def cut(tree):
    """The arrays in shards, on the mesh that is set; or on one device."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return jax.device_put(tree)
    specs = sharding.specs_of(tree)
    return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), tree, specs)


def loss_and_gradients():
    base, lora = map(cut, model())
    rng = np.random.default_rng(0)
    ids = rng.integers(CONFIG.vocab, size=(8, 17))
    weights = (rng.random((8, 16)) < 0.7).astype(np.float32)
    rows = sharding.share(ids, 0), sharding.share(weights, 0)
    loss = jax.value_and_grad(qlora.sum_of_losses, argnums=1)
    loss, gradients = jax.jit(loss, static_argnums=(4, 5, 6))(
        base, lora, *rows, CONFIG, 2.0, "float32"
    )
    cuts = jax.tree.map(lambda x: x.sharding.is_fully_replicated, (lora, gradients))
    assert cuts[0] == cuts[1]
    return jax.device_get((loss, gradients))


def answer():
    base, lora = map(cut, model())
    options = {"config": CONFIG, "scale": 2.0, "dtype": "float32", "length": 9, "add": False}
    start = np.array([[3, 1, 4]]), jax.random.key(0), np.array([0])
    return np.asarray(sharding.run(llama.sample, base, lora, *start, **options))


@pytest.mark.parametrize("count", [4, pytest.param(2, marks=slow), pytest.param(8, marks=slow)])
def test_loss_and_gradients_are_those_of_one_device(count):
    """Sums over rows and over a layer's outputs have another order, in float32."""
    loss, gradients = loss_and_gradients()
    with mesh_of(count):
        actual_loss, actual = loss_and_gradients()
    np.testing.assert_allclose(actual_loss, loss, rtol=1e-6)
    for name, sides in gradients.items():
        for side, gradient in sides.items():
            error = np.linalg.norm(actual[name][side] - gradient)
            assert error <= 5e-6 * np.linalg.norm(gradient), (name, side)


@slow
@pytest.mark.parametrize("count", [2, 8])
def test_an_answer_is_that_of_one_device(count):
    """Every device does the same work, with whole layers."""
    expected = answer()
    with mesh_of(count):
        np.testing.assert_array_equal(answer(), expected)


def test_the_optimizer_needs_no_other_device():
    """Only the norm of all gradients, for clipping, is a sum over devices."""
    with mesh_of(4):
        lora = cut(model()[1])
        tx = paged_optax.paged_adamw8bit(1e-3)
        program = jax.jit(tx.update).lower(lora, tx.init(lora), lora).compile().as_text()
    assert "paged_optax_update" in program
    assert not [name for name in COLLECTIVES if name in program]


# ---------------------------------------------------------------------------------- whole runs

OPTIONS = "model --text chats.jsonl --steps 6 --warmup 1 --seq-len 16 --batch 8 --accumulate 2"
OPTIONS += " --rank 64 --lr 0.003 --log-every 1 --answer-tokens 3 --prompt why --dtype float32"
OPTIONS += " --save-every 2"
ADAPTER = "adapter_model.safetensors"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A tiny checkpoint and texts, in the working directory."""
    write(tmp_path / "model")
    line = json.dumps({"messages": chat("why is the sky blue", "because the sky is")})
    (tmp_path / "chats.jsonl").write_text("\n".join([line] * 40))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(qlora, "load_tokenizer", lambda folder: Tokenizer())
    for name in "paged_adamw8bit", "paged_sgd8bit":
        make = functools.partial(getattr(paged_optax, name), quantization=DYNAMIC)
        monkeypatch.setitem(qlora.OPTIMIZERS, name, make)
    return tmp_path


def train(devices, *options):
    """Runs the example; returns all its losses."""
    options = [*OPTIONS.split(), f"--devices={devices}", f"--adapter=on-{devices}", *options]
    result = qlora.main(options)
    return np.array([result.before, *[row[1] for row in result.history], result.after])


# How far losses may differ, in nats; the sums of another number of devices round in another order.
# Adam makes a whole step of any gradient, and a code may be another one: both widen differences.
SGD = "paged_sgd8bit", [4], 1e-5
ADAMW = "paged_adamw8bit", [2, 4, 8], 5e-3


@pytest.mark.endurance
@pytest.mark.parametrize(("optimizer", "counts", "bound"), [SGD, ADAMW], ids=lambda x: str(x))
def test_losses_are_those_of_one_device(optimizer, counts, bound, folder, capsys):
    expected = train(1, "--optimizer", optimizer)
    assert expected[-1] < expected[0] - 20 * bound
    answers = capsys.readouterr().out.split("before:")[1].split("adapters")[0]
    for count in counts:
        losses = train(count, "--optimizer", optimizer)
        np.testing.assert_allclose(losses, expected, rtol=0, atol=bound)
        printed = capsys.readouterr().out
        assert answers in printed and f"on each of {count} devices" in printed
        assert all(f"cpu:{i} " in printed for i in range(count))
        one, several = (load_file(folder / f"on-{n}" / ADAPTER) for n in (1, count))
        assert one.keys() == several.keys()
        for name, array in one.items():
            np.testing.assert_allclose(several[name], array, rtol=0, atol=5 * bound)


@pytest.mark.endurance
@pytest.mark.parametrize("optimizer", ["paged_adamw8bit", "adamw"])
def test_a_killed_run_goes_on_on_other_devices(optimizer, folder, monkeypatch):
    options = ["--optimizer", optimizer]
    whole = train(4, *options)
    options += ["--checkpoint-dir", "run"]
    save = qlora.Checkpoints.save

    def kill_after(last):
        def killed(self, step, state, history):
            save(self, step, state, history)
            if step == last:
                raise KeyboardInterrupt

        monkeypatch.setattr(qlora.Checkpoints, "save", killed)

    for devices, last in (4, 3), (2, 5):
        kill_after(last)
        with pytest.raises(KeyboardInterrupt):
            train(devices, *options)
    kill_after(None)
    losses = train(1, *options)
    np.testing.assert_array_equal(losses[1:3], whole[1:3])
    np.testing.assert_allclose(losses, whole, rtol=0, atol=ADAMW[-1])


# Two processes of two devices each, or one of four: its losses, and the bytes of tensors it read.
JOB = """
    examples, tests, options = sys.argv[6], sys.argv[7], sys.argv[8:]
    sys.path[:0] = examples, tests
    import contextlib
    import json

    import hf_checkpoint
    import qlora
    from test_qlora import Tokenizer

    class Recorder:
        def __init__(self, of):
            self.of = of

        def __getattr__(self, name):
            return getattr(self.of, name)

        def get_slice(self, name):
            return Recorder(self.of.get_slice(name))

        def __getitem__(self, index):
            part = self.of[index]
            read.append(part.nbytes)
            return part

    @contextlib.contextmanager
    def recorded(path, framework):
        with safe_open(path, framework=framework) as file:
            yield Recorder(file)

    read, safe_open = [], hf_checkpoint.safe_open
    hf_checkpoint.safe_open = recorded
    qlora.load_tokenizer = lambda folder: Tokenizer()
    result = qlora.main([*options, f"--adapter=by-{count}"])
    losses = [result.before, *[row[1] for row in result.history], result.after]
    found = {"read": sum(read), "losses": [float(loss) for loss in losses]}
    print("found", json.dumps(found))
"""


def run_job(folder, count, *options):
    """Returns bytes read and losses of each process, and all that they printed."""
    paths = Path(qlora.__file__).parent, Path(__file__).parent
    options = *OPTIONS.split(), *options
    codes, texts = processes.run(JOB, folder, "cpu", count, *paths, *options, name=count)
    assert not any(codes), "\n".join(texts)
    found = [re.search("^found (.*)", text, re.M) for text in texts]
    return [json.loads(line[1]) for line in found if line], texts


@pytest.mark.endurance
def test_two_processes(folder):
    """Each reads its half of the checkpoint only; the first alone speaks; one process goes on."""
    paths = (folder / "model").glob("*.safetensors")
    size = sum(x.nbytes for path in paths for x in load_file(path).values())
    kept = "--checkpoint-dir", folder / "run"
    (first, second), texts = run_job(folder, 2, *kept)
    assert first["read"] == second["read"] == size // 2
    assert first["losses"] == second["losses"]
    assert "held-out loss" in texts[0] and "elsewhere" in texts[0]
    assert "held-out" not in texts[1] and "fine-tune" not in texts[1]
    shutil.rmtree(folder / "run" / "6")  # so that the newest is that of step 4
    (one,), _ = run_job(folder, 1, *kept)
    assert one["read"] == size
    assert one["losses"][1:5] == first["losses"][1:5]
    np.testing.assert_allclose(one["losses"], first["losses"], rtol=0, atol=ADAMW[-1])
    adapters = [load_file(folder / f"by-{count}" / ADAPTER) for count in (1, 2)]
    for name, array in adapters[0].items():
        np.testing.assert_allclose(adapters[1][name], array, rtol=0, atol=5 * ADAMW[-1])
