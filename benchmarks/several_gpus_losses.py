"""Losses of 1, 2, ... GPUs on the same data, next to those of other random bits on one GPU.

    python benchmarks/several_gpus_losses.py [--gpus 2] [--steps 60]

Two runs of one program on one GPU differ by the order of sums (the gradient of the embedding), and
other seeds of the random bits by more. Each row says by how much the losses of a run differ from
those of the first run with its format: on average and at most, over the second half of the steps,
and on average over all of them with their sign.
"""

import argparse
import tempfile

import fsdp
import jax
import numpy as np
import optax

from paged_optax import Quantization, paged_adamw8bit, release


def losses(args: argparse.Namespace, num_gpus: int, codec: str, seed: int) -> np.ndarray:
    """Trains a new model; returns its losses."""
    schedule = optax.linear_schedule(0.0, args.lr, 10)
    tx = optax.adamw(schedule)
    if codec != "optax.adamw":
        quantization = Quantization(codec, seed=seed)
        tx = paged_adamw8bit(schedule, param_rounding="compensated", quantization=quantization)
    with jax.set_mesh(fsdp.make_mesh(num_gpus)):
        data = fsdp.batches(args.batch, args.length)
        config, paged = fsdp.SHAPES[args.shape], codec != "optax.adamw"
        training = fsdp.begin(config, "full", tx, next(data), paged)
        found = np.array([float(training.step(next(data))) for _ in range(args.steps)])
        if paged:
            release(training.state)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=fsdp.SHAPES, default="100m")
    parser.add_argument("--gpus", type=int, nargs="+", default=[2])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--lr", type=float, default=3e-4)
    args = parser.parse_args()
    # The same compiled gradient for all runs: compiled anew, it may add in another order.
    jax.config.update("jax_compilation_cache_dir", tempfile.mkdtemp())
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    gpus = [1, *args.gpus]
    runs = [(1, "ratio", 0), *((n, "ratio", 0) for n in gpus)]
    runs += [(1, "dynamic", 0), *((n, "dynamic", 0) for n in gpus)]
    runs += [(n, "optax.adamw", 0) for n in gpus]
    runs += [(1, "ratio", seed) for seed in (1, 2, 3)]
    print(f"{args.shape}, {args.batch * args.length:,} tokens a step, {args.steps} steps")
    header = ("seed", "last loss", "differs by", "at most", "mean")
    print(f"{'GPUs':<6}{'format':<14}" + "".join(f"{name:>12}" for name in header))
    first: dict[str, np.ndarray] = {}
    for num_gpus, codec, seed in runs:
        found = losses(args, num_gpus, codec, seed)
        difference = found - first.setdefault(codec, found)
        late = np.abs(difference[args.steps // 2 :])
        cells = f"{seed:>12}{found[-1]:>12.4f}{late.mean():>12.5f}{late.max():>12.5f}"
        print(f"{num_gpus:<6}{codec:<14}{cells}{difference.mean():>+12.5f}", flush=True)


if __name__ == "__main__":
    main()
