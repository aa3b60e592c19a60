"""Times whole steps of `paged(tx)` beside tx itself and, where there is one, beside its own kernel.

    python benchmarks/any_optimizer.py [--repeats N] [--steps N] [--leaf-mib N] [--leaves N]

A step is the update and `optax.apply_updates`, donated. The fastest of
several runs each, in turn. "on host" has all states in host memory.
"""

import argparse
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax

from paged_optax import Paging, Quantization, memory_report, paged, paged_adam8bit

RATE = 1e-3


class Run:
    """Steps of one transformation."""

    def __init__(self, tx: Any, params: Any, grads: Any):
        def step(params, state, grads):
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        self._step = jax.jit(step, donate_argnums=(0, 1))
        self._carry: Any = (jax.tree.map(jnp.copy, params), tx.init(params))
        self._grads = grads  # not a constant of the program, which takes long to compile
        self.take(2)
        self.ms = float("inf")

    def take(self, count: int) -> float:
        """Milliseconds a step."""
        start = time.perf_counter()
        for _ in range(count):
            self._carry = self._step(*self._carry, self._grads)
        jax.block_until_ready(self._carry)
        return 1e3 * (time.perf_counter() - start) / count

    def nbytes(self) -> int:
        """Bytes of the states outside of XLA."""
        state = self._carry[1]
        if not any(leaf.shape == (2,) for leaf in jax.tree.leaves(state)):
            return 0
        return memory_report(state).total


def rows(on_gpu: bool):
    for codec in ("ratio", "bfloat16", "float32"):
        places = {"": None} | ({" on host": Paging(device_bytes=0)} if on_gpu else {})
        for place, paging in places.items():
            options = {"quantization": Quantization(codec), "paging": paging}
            yield f"paged_adam8bit {codec}{place}", paged_adam8bit(RATE, **options)
            yield f"paged(adam) {codec}{place}", paged(optax.adam(RATE), **options)
    yield "optax.adam", optax.adam(RATE)
    yield "paged(adan) ratio", paged(optax.adan(RATE))
    yield "optax.adan", optax.adan(RATE)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--steps", type=int, default=5, help="that are timed together")
    parser.add_argument("--leaf-mib", type=int, default=None)
    parser.add_argument("--leaves", type=int, default=8)
    args = parser.parse_args()
    on_gpu = jax.default_backend() == "gpu"
    size = (args.leaf_mib or (128 if on_gpu else 4)) * 2**18
    keys = jax.random.split(jax.random.key(0), args.leaves)
    params = {f"w{i}": jax.random.normal(key, (size // 256, 256)) for i, key in enumerate(keys)}
    grads = jax.tree.map(lambda leaf: 0.1 * leaf, params)
    print(f"{jax.devices()[0].device_kind}, {args.leaves} leaves of {4 * size / 2**20:.0f} MiB")
    print("a step: ms, MiB of states outside of XLA")
    runs = {name: Run(tx, params, grads) for name, tx in rows(on_gpu)}
    for _ in range(args.repeats):  # in turn, so that what else the machine does hits all alike
        for run in runs.values():
            run.ms = min(run.ms, run.take(args.steps))
    for name, run in runs.items():
        print(f"{name:<34}{run.ms:9.2f}{run.nbytes() / 2**20:9.0f}", flush=True)


if __name__ == "__main__":
    main()
