"""Measures what XLA holds for a large optimizer state: optax.adamw against paged_adamw8bit.

    python benchmarks/memory.py [--params 1e9] [--device-bytes N]

It reads `device.memory_stats()` before the state exists and after its first update. A CPU's
allocator keeps no such numbers, so there it prints only the paged state's own report.
"""

import argparse

import jax
import jax.numpy as jnp
import optax

from paged_optax import Paging, memory_report, paged_adamw8bit, release


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
    args = parser.parse_args()
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
