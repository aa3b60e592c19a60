"""Times the update of every optimizer alone, in device memory and in host memory.

    python benchmarks/family.py [--repeats N] [--codec ratio]

"of copy" is the share of a copy's memory rate that an update reaches for the bytes that it has to
move: gradient in, update out, states in and out. With "on host" all states are in host memory, and
"GB/s" is what they take of the link each way.
"""

import argparse
import functools
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
from step import DISPATCHED, copy_rate

import paged_optax
from paged_optax import Paging, Quantization, memory_report, release

OPTIMIZERS = {
    "adam": paged_optax.scale_by_paged_adam8bit,
    "lion": paged_optax.scale_by_paged_lion8bit,
    "momentum": functools.partial(paged_optax.scale_by_paged_trace8bit, 0.9),
    "rms": paged_optax.scale_by_paged_rms8bit,
    "adagrad": paged_optax.scale_by_paged_rss8bit,
    "centered": paged_optax.scale_by_paged_stddev8bit,
    "ademamix": paged_optax.scale_by_paged_ademamix8bit,
}


def update_ms(tx, grads, repeats: int) -> tuple[float, int]:
    """The time of an update, and the states' bytes.

    An update's result is the next one's gradient. A few of them in a row, then it is the gradients
    again: gradients over their own variance grow from step to step, and what overflows takes more
    time than a gradient that somebody would train with.
    """
    step = jax.jit(tx.update, donate_argnums=(0, 1))
    state: Any = tx.init(grads)
    times = []
    for _ in range(repeats + 1):  # the first one compiles
        carry = jax.block_until_ready((jnp.copy(grads), state))
        start = time.perf_counter()
        for _ in range(DISPATCHED):
            carry = step(*carry)
        jax.block_until_ready(carry)
        times.append((time.perf_counter() - start) / DISPATCHED)
        state = carry[1]
    nbytes = memory_report(state).total
    release(state)
    return 1e3 * statistics.median(times[1:]), nbytes


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--codec", default=Quantization().codec)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    quantization = Quantization(args.codec)
    on_gpu = jax.default_backend() == "gpu"
    grads = jax.random.normal(jax.random.key(0), (2**28 if on_gpu else 10_000_000,), args.dtype)
    rate = copy_rate(2**30 if on_gpu else 2**26, args.repeats)
    print(f"{jax.devices()[0].device_kind}, copy {rate / 1e9:.0f} GB/s (read + write)")
    print(f"{grads.size / 1e6:.0f}M {args.dtype}, {args.codec}: ms, of copy, ms on host, GB/s")
    for name, make in OPTIMIZERS.items():
        ms, states = update_ms(make(quantization=quantization), grads, args.repeats)
        share = 2 * (grads.nbytes + states) / (1e-3 * ms) / rate
        row = f"{name:<12}{ms:9.2f}{share:8.0%}"
        if on_gpu:
            tx = make(quantization=quantization, paging=Paging(device_bytes=0))
            hosted, _ = update_ms(tx, grads, max(1, args.repeats // 3))
            row += f"{hosted:9.2f}{states / (1e-3 * hosted) / 1e9:8.1f}"
        print(row, flush=True)


if __name__ == "__main__":
    main()
