"""Measures what XLA holds for a large optimizer state: optax.adamw against paged_adamw8bit.

    python benchmarks/memory.py [--params 1e9] [--device-bytes N]
    python benchmarks/memory.py --temporary    # of a step, from XLA's analysis of its program

It reads `device.memory_stats()` before the state exists and after its first update. A CPU's
allocator keeps no such numbers, so there it prints only the paged state's own report.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import SingleDeviceSharding

from paged_optax import (
    Paging,
    Quantization,
    memory_report,
    paged,
    paged_adamw8bit,
    paged_muon8bit,
    release,
)

LEAVES, WIDTH = 8, 4096  # of the step whose program is analysed: 64 MiB each


def print_temporary(device: Any) -> None:
    """Memory of programs that step, which are compiled and not run."""
    where = SingleDeviceSharding(device)
    leaf = jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32, sharding=where)
    params = {f"w{i}": leaf for i in range(LEAVES)}
    print(f"{device.device_kind}, {LEAVES} matrices of {leaf.size >> 18} MiB: MiB of a step")
    print(f"{'optimizer':<34}{'temporary':>14}{'state in XLA':>14}")
    optimizers = {
        "optax.adamw": optax.adamw(1e-3),
        "paged(optax.adamw)": paged(optax.adamw(1e-3)),
        "optax.adan": optax.adan(1e-3),
        "paged(optax.adan)": paged(optax.adan(1e-3)),
        "optax.contrib.muon": optax.contrib.muon(1e-3),
        "paged(optax.contrib.muon)": paged(optax.contrib.muon(1e-3)),
        "paged_muon8bit": paged_muon8bit(1e-3),
        "paged_muon8bit, bfloat16": paged_muon8bit(1e-3, quantization=Quantization("bfloat16")),
    }
    for name, tx in optimizers.items():

        def step(grads, state, params, tx=tx):
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        state = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
            jax.eval_shape(tx.init, params),
        )
        program = jax.jit(step, donate_argnums=(0, 1, 2)).lower(params, state, params).compile()
        memory: Any = program.memory_analysis()
        kept = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
        temporary = memory.temp_size_in_bytes
        print(f"{name:<34}{temporary / 2**20:>14,.0f}{kept / 2**20:>14,.0f}", flush=True)


def bytes_in_use() -> int | None:
    stats = jax.devices()[0].memory_stats()
    return stats["bytes_in_use"] if stats else None


def measure(tx: optax.GradientTransformation, num_params: int) -> tuple[int | None, object]:
    """Returns the bytes of XLA's memory that the state takes after one step, and the state."""
    width = 8192
    params = {"w": jnp.ones((num_params // width, width), jnp.float32)}
    jax.block_until_ready(params)
    before = bytes_in_use()
    state = jax.jit(tx.init)(params)

    def step(params, state):
        updates, state = tx.update(params, state, params)
        return optax.apply_updates(params, updates), state

    params, state = jax.block_until_ready(jax.jit(step, donate_argnums=(0, 1))(params, state))
    after = bytes_in_use()
    return (None if before is None or after is None else after - before), state


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--params", type=float, default=1e9, help="number of float32 parameters")
    parser.add_argument("--device-bytes", type=int, help="budget for resident moments")
    parser.add_argument("--temporary", action="store_true", help="memory of a step")
    args = parser.parse_args()
    if args.temporary:
        print_temporary(jax.devices()[0])
        return
    num_params = int(args.params)

    print(f"{jax.devices()[0].device_kind}, {num_params:.3g} parameters")
    print(f"{'optimizer':<34}{'MiB in XLA':>14}{'bytes/parameter':>18}")
    paging = Paging(device_bytes=args.device_bytes)
    optimizers = {
        "optax.adamw": optax.adamw(1e-3),
        "optax.adamw(mu_dtype=bfloat16)": optax.adamw(1e-3, mu_dtype=jnp.bfloat16),
        "paged_adamw8bit": paged_adamw8bit(1e-3, paging=paging),
    }
    for name, tx in optimizers.items():
        nbytes, state = measure(tx, num_params)
        if nbytes is None:
            print(f"{name:<34}{'unknown':>14}{'unknown':>18}")
        else:
            print(f"{name:<34}{nbytes / 2**20:>14,.2f}{nbytes / num_params:>18.4f}")
        if name.startswith("paged"):
            print("\nOutside XLA:")
            print(memory_report(state))
            release(state)
        del state


if __name__ == "__main__":
    main()
