"""QLoRA fine-tuning of a small Llama-style model with 8-bit AdamW moments outside XLA's memory.

`main` does the following, in this order:

1. It pre-trains a small base model briefly on English text that every CPython ships (the help
   topics of `pydoc`). You would load a checkpoint instead.
2. It quantizes the weights to NF4 and adds LoRA adapters. qwix does this without a change to the
   model's code.
3. It trains the adapters on another kind of text, the source code of the standard library, with
   `optax.chain(clip, paged_adamw8bit(schedule))`. It measures the loss on text that the model has
   not seen, before and after.
4. It prints the optimizer's memory next to that of float32 AdamW, and saves a plot.

The example downloads nothing. Tokens are bytes, and losses are in nats per byte. `tiny_llama.py`
has the model and its training step, `finetuning.py` the training loops. Try::

    python examples/lora_finetune.py --optimizer adamw
    python examples/lora_finetune.py --text my_notes/*.md --rank 32 --steps 300
    python examples/lora_finetune.py --checkpoint-dir run  # kill it, and start it again
"""

import argparse

import finetuning
import jax
import jax.numpy as jnp
import optax
import qwix
from finetuning import Result, optimizer_with
from flax import nnx
from tiny_llama import Llama

from paged_optax import paged_adamw8bit

NF4_TILE = 64  # weights that share one scale, as in the QLoRA paper; divides the widths


def pretrain(args: argparse.Namespace) -> Llama:
    """Returns the base model. The same arguments give the same model."""
    model = Llama(nnx.Rngs(args.seed))
    finetuning.pretrain(model, args)
    return model


def add_adapters(base: Llama, args: argparse.Namespace) -> nnx.Module:
    """Returns a copy of `base` with projections in NF4, each with a LoRA adapter in float32."""
    quantized = {"weight_qtype": "nf4", "tile_size": NF4_TILE}
    provider = qwix.LoraProvider(
        module_path=r".*_proj", rank=args.rank, alpha=2 * args.rank, **quantized
    )
    ids = jnp.zeros((1, args.seq_len), jnp.int32)  # qwix finds the weights by running the model
    model = qwix.apply_lora_to_model(base, provider, ids, rngs=nnx.Rngs(args.seed))
    assert isinstance(model, nnx.Module)
    # Arrays that were not quantized still belong to `base`. Donation would destroy them there.
    nnx.update(model, jax.tree.map(jnp.copy, nnx.state(model)))
    return model


def finetune(base: Llama, args: argparse.Namespace) -> Result:
    """Trains adapters on the target text over a quantized copy of `base`."""
    model = add_adapters(base, args)
    adamw = paged_adamw8bit if args.optimizer == "paged_adamw8bit" else optax.adamw
    tx = optimizer_with(adamw, args.lr, args.steps)  # optax.chain(clip, adamw(schedule))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)
    return finetuning.finetune(model, optimizer, args)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Returns the options, checked and with the default texts filled in."""
    parser = finetuning.options(
        "QLoRA fine-tuning of a small language model with paged_adamw8bit.",
        out="lora_finetune.png",
        what="adapters",
    )
    parser.add_argument("--rank", type=int, default=32, help="rank of the adapters")
    return finetuning.parse(parser, argv)


def main(argv: list[str] | None = None) -> Result:
    """Pre-trains, fine-tunes, and shows the results."""
    args = parse_args(argv)
    result = finetune(pretrain(args), args)
    print(finetuning.summary(result, args))
    finetuning.plot(result, args, f"LoRA, rank {args.rank}")
    print(f"plot saved as {args.out}")
    return result


if __name__ == "__main__":
    main()
