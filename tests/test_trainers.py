"""Trainers of other projects stop, and resume in another process, as if they had not stopped.

For Tunix a lean installation will do: ``pip install --no-deps google-tunix google-metrax``, and
what `import tunix` asks for. Without it, and without Equinox, these tests skip themselves.
"""

import importlib.util
import json

import pytest

from helpers import run_python

pytestmark = pytest.mark.slow

TUNIX = """
    import json, os, sys
    kind, num_devices, folder, steps = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    import jax
    jax.config.update("jax_num_cpu_devices", num_devices)
    import jax.numpy as jnp, numpy as np, optax, qwix
    import orbax.checkpoint as ocp
    from flax import nnx
    from tunix.models.llama3.model import Llama3, ModelConfig
    from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig, TrainingInput

    import paged_optax

    config = ModelConfig(
        num_layers=1, vocab_size=64, embed_dim=256, hidden_dim=256, num_heads=4, head_dim=64,
        num_kv_heads=2, rope_theta=10_000, norm_eps=1e-5,
    )
    shape = (4, 2) if num_devices == 8 else (num_devices, 1)
    mesh = jax.make_mesh(shape, ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def on_mesh(model):
        state = nnx.state(model)
        nnx.update(model, jax.device_put(state, nnx.get_named_sharding(state, mesh)))
        return model

    def make_model():
        model = Llama3(config, rngs=nnx.Rngs(0))
        quantized = dict(weight_qtype="nf4", tile_size=32) if kind == "qlora" else {}
        path = ".*(q|kv|o|gate|up|down)_proj"
        provider = qwix.LoraProvider(module_path=path, rank=16, alpha=32.0, **quantized)
        return on_mesh(
            qwix.apply_lora_to_model(model, provider, rngs=nnx.Rngs(1), **model.get_model_input())
        )

    def data():
        rng = np.random.default_rng(0)
        for _ in range(steps):
            tokens = rng.integers(64, size=(8, 16)).astype(np.int32)
            yield TrainingInput(input_tokens=tokens, input_mask=np.ones_like(tokens))

    def to_model_input(x):
        length = x.input_tokens.shape[1]
        mask = jnp.tril(jnp.ones((length, length), bool))
        return {
            "input_tokens": x.input_tokens,
            "input_mask": x.input_mask,
            "positions": jnp.broadcast_to(jnp.arange(length), x.input_tokens.shape),
            "attention_mask": jnp.broadcast_to(mask, (x.input_tokens.shape[0], length, length)),
        }

    losses = {}

    class Trainer(PeftTrainer):
        def _buffer_metrics(self, buffer, *, loss, step, **others):
            losses[step] = float(loss)
            return super()._buffer_metrics(buffer, loss=loss, step=step, **others)

    with mesh:
        tx = optax.chain(
            optax.clip_by_global_norm(1.0),
            paged_optax.paged_adamw8bit(
                1e-2, mu_dtype=None, quantization=paged_optax.Quantization(min_size=0)
            ),
        )
        trainer = Trainer(
            make_model(),
            tx,
            TrainingConfig(
                eval_every_n_steps=100,
                max_steps=steps,
                checkpoint_root_directory=None if folder == "-" else folder,
                checkpointing_options=ocp.CheckpointManagerOptions(save_interval_steps=2),
                pbar_description=None,
            ),
        ).with_gen_model_input_fn(to_model_input)
        trainer.train(data())
        paged_optax.memory_report(trainer.optimizer)  # raises if there is no paged state in it
    print("losses", json.dumps(losses))
"""


def losses_of(program, folder, *arguments):
    cache = {  # programs are compiled once for all runs
        "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    process = run_python(program, folder, *arguments, **cache)
    (line,) = [line for line in process.stdout.splitlines() if line.startswith("losses")]
    return json.loads(line.removeprefix("losses"))


@pytest.mark.parametrize("num_devices", [1, 8])
@pytest.mark.parametrize("kind", ["lora", "qlora"])
def test_tunix(kind, num_devices, tmp_path):
    if importlib.util.find_spec("tunix") is None:
        pytest.skip("needs Tunix")
    whole = losses_of(TUNIX, tmp_path, kind, num_devices, "-", 6)
    first = losses_of(TUNIX, tmp_path, kind, num_devices, tmp_path / "run", 4)
    rest = losses_of(TUNIX, tmp_path, kind, num_devices, tmp_path / "run", 6)
    assert list(first) == ["0", "1", "2", "3"] and list(rest) == ["4", "5"]
    assert first | rest == whole


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
