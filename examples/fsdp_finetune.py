"""Full fine-tuning of a small Llama-style model, cut into shards over all devices (FSDP).

Every device keeps an equal part of each parameter, of its gradient and of its 8-bit AdamW moments,
and works on an equal part of the batch. `Sharded` does this: a layer gathers its weights when it
runs, and the gradients of a gather come back as shards. The optimizer is the same line as on one
device. Each device updates the moments of its own shards.

As in `lora_finetune.py`, a base model is pre-trained briefly and then fine-tuned on another kind of
text. The example shows the held-out loss, the optimizer's memory and a plot. It also checks that no
device holds more than its share. It downloads nothing. Without a GPU the CPU acts as eight devices.
Try::

    python examples/fsdp_finetune.py --optimizer adamw
    python examples/fsdp_finetune.py --devices 2 --text my_notes/*.md --steps 300
    python examples/fsdp_finetune.py --checkpoint-dir run  # kill it, and start it again

With one process a GPU, on one machine or several, start each with the address of the first::

    CUDA_VISIBLE_DEVICES=0 python examples/fsdp_finetune.py --distributed localhost:1234 2 0 &
    CUDA_VISIBLE_DEVICES=1 python examples/fsdp_finetune.py --distributed localhost:1234 2 1
"""

import argparse
import math

import finetuning
import jax
import numpy as np
import optax
import sharding
from finetuning import Result, bytes_by_device, optimizer_with
from flax import nnx
from jax.sharding import PartitionSpec as P
from jax.sharding import reshard
from sharding import AXIS, axis_of, gather
from tiny_llama import Llama

from paged_optax import paged_adamw8bit

DEVICES = 1, 2, 4, 8  # these divide every width of the model and the batches of the evaluation
BYTES = {"paged_adamw8bit": 2 + 8 / 256, "adamw": 8}  # of moments for a parameter


def shard(x: jax.Array) -> jax.Array:
    """Cuts `x` along the largest dimension that the devices can share equally."""
    devices = jax.sharding.get_abstract_mesh().size
    sizes = [size if size % devices == 0 else 0 for size in x.shape]
    spec: list[str | None] = [None] * x.ndim
    if any(sizes):
        spec[np.argmax(sizes)] = AXIS
    return reshard(x, P(*spec))


class Sharded(nnx.Module):
    """A layer that keeps its parameters as shards and makes them whole only while it runs."""

    def __init__(self, layer):
        nnx.update(layer, jax.tree.map(shard, nnx.state(layer)))
        self.layer = layer

    @nnx.remat  # the backward pass gathers again, so that nothing keeps whole weights until then
    def __call__(self, x):
        graphdef, shards = nnx.split(self.layer)
        specs = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, shards)

        # The layer's own code sees whole weights and one device's part of the batch.
        @jax.shard_map(in_specs=(specs, P(AXIS)), out_specs=P(AXIS))
        def run(shards, x):
            arrays = jax.tree.map(lambda x, spec: gather(x, axis_of(spec)), shards, specs)
            return nnx.merge(graphdef, arrays)(x)

        return run(shards, x)


@nnx.jit(static_argnames="seed")  # in one program, so that no device ever holds all of the model
def make_model(seed: int) -> Llama:
    return Llama(nnx.Rngs(seed), wrap=Sharded)


def finetune(model: Llama, args: argparse.Namespace) -> Result:
    """Trains all of `model` on the target text."""
    adamw = paged_adamw8bit if args.optimizer == "paged_adamw8bit" else optax.adamw
    tx = optimizer_with(adamw, args.lr, args.steps)  # optax.chain(clip, adamw(schedule))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    return finetuning.finetune(model, optimizer, args)


def shares(model: Llama, result: Result, args: argparse.Namespace) -> str:
    """Says what one device holds of parameters and moments; exits if this exceeds its share."""
    parameters, moments = bytes_by_device(nnx.state(model, nnx.Param)), result.state_bytes
    most, most_moments = max(parameters.values()) // 4, max(moments.values())
    devices = jax.sharding.get_mesh().size
    line = (
        f"no device holds more than {most:,} of {result.parameters:,} parameters and"
        f" {most_moments:,} bytes of moments"
    )
    share = result.parameters / devices
    # 10 %: small leaves keep float32 moments, and shards are stored in whole blocks. A GPU gives
    # memory for moments in units of 2 MiB.
    unit = 2 * 2**20 if jax.default_backend() == "gpu" else 1
    limit = math.ceil(1.1 * BYTES[args.optimizer] * share / unit) * unit
    if most > share or most_moments > limit:
        raise SystemExit(f"{line}: that is NOT 1/{devices} of them")
    return f"{line}: 1/{devices} of them"


def make_mesh(args: argparse.Namespace) -> jax.sharding.Mesh:
    """Returns a line of `--devices` devices."""
    jax.config.update("jax_num_cpu_devices", max(DEVICES))  # before JAX looks for devices
    if args.distributed is not None:
        sharding.join(args.distributed, max(DEVICES))
    found = jax.devices()
    devices = vars(args).get("devices", max(n for n in DEVICES if n <= len(found)))
    if devices > len(found):
        raise SystemExit(f"--devices {devices}: only {len(found)} found; ask for fewer")
    if args.batch % devices:
        raise SystemExit(
            f"--batch {args.batch}: {devices} devices cannot share it equally; give a multiple"
        )
    return sharding.make_mesh(devices)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Returns the options, checked and with the default texts filled in."""
    parser = finetuning.options(
        "Full fine-tuning of a small language model with paged_adamw8bit on all devices.",
        out="fsdp_finetune.png",
        what="model",
    )
    devices = {"type": int, "choices": DEVICES, "default": argparse.SUPPRESS}
    parser.add_argument("--devices", **devices, help="devices to use (default: all)")
    parser.add_argument(
        "--distributed",
        nargs="*",
        metavar=("ADDRESS", "PROCESSES PROCESS"),
        help="be one process of several: address of the first, their number, and which one",
    )
    args = finetuning.parse(parser, argv)
    if len(args.distributed or []) not in (0, 3):
        parser.error("argument --distributed: give address, number and index; or none")
    return args


def main(argv: list[str] | None = None) -> Result:
    """Pre-trains, fine-tunes, and shows the results."""
    args = parse_args(argv)
    mesh = make_mesh(args)
    with jax.set_mesh(mesh):
        model = make_model(args.seed)
        finetuning.pretrain(model, args)
        result = finetune(model, args)
        text = shares(model, result, args)
    if jax.process_index() == 0:
        print(finetuning.summary(result, args))
        print(text)
        finetuning.plot(result, args, f"FSDP, devices: {mesh.size}")
        print(f"plot saved as {args.out}")
    return result


if __name__ == "__main__":
    main()
