"""Tunix's PeftTrainer with a paged optimizer: LoRA or QLoRA on a small Llama, on any machine.

    pip install '.[examples]' google-tunix
    python examples/trainers/tunix_peft.py --kind qlora --checkpoint-dir run --steps 20

The one line that differs from any other program for Tunix is the optimizer's. The trainer's
checkpoints hold the moments, so a run that is killed goes on with the losses of one that was not:
run the command again, with more steps.

The model is random and predicts random tokens, so that nothing has to be downloaded. Tunix's
loaders in `tunix.models` fill the same classes with checkpoints.
"""

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import qwix
from flax import nnx
from tunix.models.llama3.model import Llama3, ModelConfig  # pyright: ignore[reportMissingImports]
from tunix.sft.peft_trainer import (  # pyright: ignore[reportMissingImports]
    PeftTrainer,
    TrainingConfig,
    TrainingInput,
)

import paged_optax

CONFIG = ModelConfig(
    num_layers=1,
    vocab_size=64,
    embed_dim=256,
    hidden_dim=256,
    num_heads=4,
    head_dim=64,
    num_kv_heads=2,
    rope_theta=10_000,
    norm_eps=1e-5,
)


def make_mesh():
    num_devices = jax.device_count()
    tensor_parallel = 2 if num_devices % 2 == 0 else 1
    return jax.make_mesh(
        (num_devices // tensor_parallel, tensor_parallel),
        ("fsdp", "tp"),
        axis_types=(jax.sharding.AxisType.Auto,) * 2,
    )


def make_model(kind, mesh):
    """A frozen model with trainable adapters; for "qlora" its weights are in NF4."""
    provider = qwix.LoraProvider(
        module_path=".*(q|kv|o|gate|up|down)_proj",
        rank=16,
        alpha=32.0,
        **({"weight_qtype": "nf4", "tile_size": 32} if kind == "qlora" else {}),
    )
    model = Llama3(CONFIG, rngs=nnx.Rngs(0))
    inputs = model.get_model_input()
    model = qwix.apply_lora_to_model(model, provider, rngs=nnx.Rngs(1), **inputs)
    state = nnx.state(model)
    nnx.update(model, jax.device_put(state, nnx.get_named_sharding(state, mesh)))
    return model


def make_optimizer():
    # The adapters of this small model have few elements, which would stay in float32: min_size=0.
    quantization = paged_optax.Quantization(min_size=0)
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        paged_optax.paged_adamw8bit(1e-2, quantization=quantization),
    )


def batches(steps):
    rng = np.random.default_rng(0)
    for _ in range(steps):
        tokens = rng.integers(CONFIG.vocab_size, size=(8, 16)).astype(np.int32)
        mask = np.ones_like(tokens)
        # Type checkers do not see the fields of Tunix's class.
        yield TrainingInput(input_tokens=tokens, input_mask=mask)  # pyright: ignore[reportCallIssue]


def to_model_input(batch):
    rows, length = batch.input_tokens.shape
    causal = jnp.tril(jnp.ones((length, length), bool))
    return {
        "input_tokens": batch.input_tokens,
        "input_mask": batch.input_mask,
        "positions": jnp.broadcast_to(jnp.arange(length), (rows, length)),
        "attention_mask": jnp.broadcast_to(causal, (rows, length, length)),
    }


class Trainer(PeftTrainer):
    """Keeps the losses of all steps."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.losses = {}

    def _buffer_metrics(self, metrics_buffer, loss, step, additional_metrics=None):
        self.losses[step] = float(loss)
        return super()._buffer_metrics(metrics_buffer, loss, step, additional_metrics)


def main():
    parser = argparse.ArgumentParser(description="Tunix's PeftTrainer with a paged optimizer.")
    parser.add_argument("--kind", choices=["lora", "qlora"], default="qlora")
    parser.add_argument("--steps", type=int, default=20, help="of the whole run")
    parser.add_argument("--checkpoint-dir", type=Path, help="where to save, and to resume from")
    parser.add_argument("--save-every", type=int, default=2, help="steps")
    parser.add_argument("--cpu-devices", type=int, help="as many virtual devices on a CPU")
    args = parser.parse_args()
    if args.cpu_devices:
        jax.config.update("jax_num_cpu_devices", args.cpu_devices)
    mesh = make_mesh()
    config = TrainingConfig(
        eval_every_n_steps=args.steps + 1,
        max_steps=args.steps,
        checkpoint_root_directory=args.checkpoint_dir and str(args.checkpoint_dir.absolute()),
        checkpointing_options=ocp.CheckpointManagerOptions(save_interval_steps=args.save_every),
        pbar_description=None,
    )
    with mesh:
        trainer = Trainer(make_model(args.kind, mesh), make_optimizer(), config)
        trainer.with_gen_model_input_fn(to_model_input).train(batches(args.steps))
        print(paged_optax.memory_report(trainer.optimizer))
    print("losses", json.dumps(trainer.losses))


if __name__ == "__main__":
    main()
