"""Trainers of other projects stop, and resume in another process, as if they had not stopped.

They need the extras ``trainers`` and ``maxtext``, and ``pip install --no-deps google-tunix
google-metrax maxtext``, which would bring much else that their trainers do not import. Without them
these tests skip themselves.
"""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from helpers import run_python

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[1] / "examples/trainers"
TUNIX = (EXAMPLES / "tunix_peft.py").read_text()
MAXTEXT = (EXAMPLES / "maxtext_pretrain.py").read_text()


def run(program, folder, *arguments, **environment):
    """Runs a program, with a cache of compiled programs for all that run in this folder."""
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    return run_python(program, folder, *arguments, **cache, **environment)


def losses_of(program, folder, *arguments):
    process = run(program, folder, *arguments)
    (line,) = [line for line in process.stdout.splitlines() if line.startswith("losses")]
    return json.loads(line.removeprefix("losses"))


@pytest.mark.parametrize("num_devices", [1, 8])
@pytest.mark.parametrize("kind", ["lora", "qlora"])
def test_tunix(kind, num_devices, tmp_path):
    if importlib.util.find_spec("tunix") is None:
        pytest.skip("needs Tunix")
    arguments = ["--kind", kind, "--cpu-devices", num_devices, "--steps"]
    saved = ["--checkpoint-dir", tmp_path / "run"]
    whole = losses_of(TUNIX, tmp_path, *arguments, 6)
    first = losses_of(TUNIX, tmp_path, *arguments, 4, *saved)
    rest = losses_of(TUNIX, tmp_path, *arguments, 6, *saved)
    assert list(first) == ["0", "1", "2", "3"] and list(rest) == ["4", "5"]
    assert first | rest == whole


@pytest.mark.parametrize("num_devices", [1, 8])
def test_maxtext(num_devices, tmp_path):
    """Its own loop, checkpoints and learning rates; it adds the losses of a run to one file."""
    if importlib.util.find_spec("maxtext") is None:
        pytest.skip("needs MaxText")

    def train(name, steps):
        run(MAXTEXT, tmp_path, name, f"steps={steps}", JAX_NUM_CPU_DEVICES=str(num_devices))
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [(line["step"], line["learning/loss"]) for line in map(json.loads, lines)]

    whole = train("whole", 6)
    assert train("stopped", 4) == whole[:4]
    assert (tmp_path / "stopped/paged/checkpoints/3/items/paged_optax").is_dir()
    assert train("stopped", 6) == whole
    assert whole[-1][1] < 0.5 * whole[0][1]


EQUINOX = """
    import json, sys
    import equinox as eqx, jax, jax.numpy as jnp, optax
    import paged_optax

    folder, begin, end = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    model = eqx.nn.MLP(64, 64, 128, 2, key=jax.random.key(0))
    tx = paged_optax.paged_adamw8bit(1e-2)
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))
    if begin:
        model, state = eqx.tree_deserialise_leaves(f"{folder}/run.eqx", (model, state))
        state = paged_optax.load_moments(state, f"{folder}/run.safetensors")

    @eqx.filter_jit(donate="all")
    def step(model, state, x):
        loss, grads = eqx.filter_value_and_grad(
            lambda model: jnp.mean((jax.vmap(model)(x) - jnp.sin(x)) ** 2)
        )(model)
        updates, state = tx.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), state, loss

    losses = []
    for i in range(begin, end):
        model, state, loss = step(model, state, jax.random.normal(jax.random.key(i), (32, 64)))
        losses.append(float(loss))
    eqx.tree_serialise_leaves(f"{folder}/run.eqx", (model, state))
    paged_optax.save_moments(state, f"{folder}/run.safetensors")
    print("losses", json.dumps(losses))
"""


def test_equinox(tmp_path):
    """A format that no hook reaches: `save_moments` and `load_moments` next to it."""
    if importlib.util.find_spec("equinox") is None:
        pytest.skip("needs Equinox")
    whole = losses_of(EQUINOX, tmp_path, tmp_path, 0, 20)
    first = losses_of(EQUINOX, tmp_path, tmp_path, 0, 10)
    assert first + losses_of(EQUINOX, tmp_path, tmp_path, 10, 20) == whole


def test_equinox_as_on_the_page(tmp_path):
    """What docs/trainers.md shows, between a model and its training."""
    if importlib.util.find_spec("equinox") is None:
        pytest.skip("needs Equinox")
    page = (EXAMPLES.parents[1] / "docs/trainers.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```py\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    (block,) = [block for block in blocks if "eqx.filter_jit" in block]
    before = """
import equinox as eqx, jax, jax.numpy as jnp
model = eqx.nn.MLP(64, 64, 128, 2, key=jax.random.key(0))
x = jax.random.normal(jax.random.key(1), (32, 64))
compute_loss = lambda model, x: jnp.mean((jax.vmap(model)(x) - jnp.sin(x)) ** 2)
"""
    after = """
losses = []
for _ in range(20):
    model, opt_state, loss = step(x, model, opt_state)
    losses.append(float(loss))
assert losses[-1] < 0.7 * losses[0], losses
"""
    run(before + block + after, tmp_path)
