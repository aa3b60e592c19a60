"""Times whole steps of the 8-bit optimizers that bitsandbytes has: its own, and ours in place.

    python benchmarks/family_peers.py [--repeats N] [--codec ratio] [--optimizers lion sgd ...]

Wants torch and bitsandbytes. The parameters are one tensor in float32, and both get the same
gradients and hyperparameters. After the first step their parameters are compared. Then steps are
timed, ten of them dispatched in a row.
"""

import argparse
import gc
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from peers import RATE, JaxRun, TorchRun
from step import DISPATCHED, make_leaves, time_ms

import paged_optax
from paged_optax import Quantization, apply_gradients

ALPHA, MOMENTUM = 0.99, 0.9  # RMSprop's, which bitsandbytes calls so, and SGD's


class Pair(NamedTuple):
    """An optimizer here and in bitsandbytes."""

    paged: Callable[..., Any]  # Quantization -> transformation
    name: str  # of the class
    options: dict[str, Any]


PAIRS = {
    "adamw": Pair(
        lambda q: paged_optax.paged_adamw8bit(RATE, weight_decay=0.0, quantization=q),
        "AdamW8bit",
        {"weight_decay": 0.0},
    ),
    "lion": Pair(
        lambda q: paged_optax.paged_lion8bit(RATE, weight_decay=0.0, quantization=q),
        "Lion8bit",
        {},
    ),
    "sgd": Pair(
        lambda q: paged_optax.paged_sgd8bit(RATE, MOMENTUM, quantization=q),
        "SGD8bit",
        {"momentum": MOMENTUM},
    ),
    "rmsprop": Pair(
        lambda q: paged_optax.paged_rmsprop8bit(RATE, ALPHA, eps_in_sqrt=False, quantization=q),
        "RMSprop8bit",
        {"alpha": ALPHA},
    ),
    "adagrad": Pair(
        lambda q: paged_optax.paged_adagrad8bit(RATE, 0.0, 1e-10, quantization=q),
        "Adagrad8bit",
        {},
    ),
    "ademamix": Pair(
        lambda q: paged_optax.paged_ademamix8bit(RATE, quantization=q),
        "AdEMAMix8bit",
        {"weight_decay": 0.0},
    ),
}


def start_paged(tx: Any, params: Any, grads: Any) -> JaxRun:
    def step(grads, state, params):
        params, state = apply_gradients(tx, grads, state, params)
        return grads, state, params

    return JaxRun(step, tx.init(params), params, grads)


def start_bitsandbytes(pair: Pair, params: Any, grads: Any) -> TorchRun:
    import bitsandbytes.optim  # pyright: ignore[reportMissingImports]

    make = getattr(bitsandbytes.optim, pair.name)
    return TorchRun(lambda leaves: make(leaves, lr=RATE, **pair.options), params, grads)


def measure(start: Callable[[Any, Any], Any], size: int, repeats: int) -> tuple[float, np.ndarray]:
    """Milliseconds of a step, and some parameters after the first one."""
    params, grads = (make_leaves([(size,)], "float32", seed) for seed in (0, 1))
    run = start(params, grads)
    run.take(1)
    run.wait()
    sample = np.array(run.sample())  # on a CPU torch shares its memory
    ms = time_ms(lambda: run.take(DISPATCHED), run.wait, DISPATCHED, repeats)
    run.close()
    gc.collect()  # what torch's optimizer leaves in cycles
    return ms, sample


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--codec", default=Quantization().codec)
    parser.add_argument("--optimizers", nargs="+", choices=list(PAIRS), default=list(PAIRS))
    args = parser.parse_args()
    size = 2**28 if jax.default_backend() == "gpu" else 1_000_000
    print(f"{jax.devices()[0].device_kind}: ms a step of {size / 1e6:.0f}M float32 parameters")
    print(f"{'':<12}{f'paged, {args.codec}':>16}{'bitsandbytes':>14}{'ratio':>8}")
    for name in args.optimizers:
        pair = PAIRS[name]
        tx = pair.paged(Quantization(args.codec))
        ours, found = measure(lambda *leaves, tx=tx: start_paged(tx, *leaves), size, args.repeats)
        theirs, expected = measure(
            lambda *leaves, pair=pair: start_bitsandbytes(pair, *leaves), size, args.repeats
        )
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-2 * RATE)
        print(f"{name:<12}{ours:>16.2f}{theirs:>14.2f}{theirs / ours:>8.1f}", flush=True)


if __name__ == "__main__":
    main()
