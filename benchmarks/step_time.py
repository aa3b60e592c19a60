"""Times one whole optimizer step (update, weight decay, apply), jitted and donated.

    python benchmarks/step_time.py [--repeats N] [--codec ratio]

The timed program makes the gradients, as a backward pass does; the first column is the time of
making them alone. The benchmark compares with optax.adamw in the same run, after a check that both
took the same first step. "kernel" is our update alone. "of copy" is the share of a copy's memory
rate that it reaches. It moves 12 bytes a parameter for float32 (gradient in, update out, 8-bit
moments in and out) and 8 for bfloat16.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from paged_optax import Paging, Quantization, paged_adamw8bit, release, scale_by_paged_adam8bit

STEPS = 10  # queued in a row and timed together


def median_ms(step, carry, repeats: int):
    """Returns the median time of `carry = step(*carry)`, and the last carry."""
    times = []
    for _ in range(repeats + 1):
        jax.block_until_ready(carry)
        start = time.perf_counter()
        for _ in range(STEPS):
            carry = step(*carry)
        jax.block_until_ready(carry)
        times.append((time.perf_counter() - start) / STEPS)
    return 1e3 * statistics.median(times[1:]), carry


def make_grads(source, scale):
    """Makes gradients in buffers of their own, which XLA cannot recompute in a later fusion."""
    return jax.lax.optimization_barrier(jax.tree.map(lambda x: x * scale.astype(x.dtype), source))


def release_if_paged(state):
    try:
        release(state)
    except ValueError:  # optax's own state
        pass


def making_ms(source, repeats):
    def program(source, scale, grads):
        del grads
        return source, scale, make_grads(source, scale)

    step = jax.jit(program, donate_argnums=(0, 2), keep_unused=True)
    source = jax.tree.map(jnp.copy, source)
    return median_ms(step, (source, jnp.float32(1), jax.tree.map(jnp.copy, source)), repeats)[0]


def full_step(tx, params, source, repeats):
    """Returns the first parameters after one step, and the time of a step."""

    def program(source, scale, params, state):
        updates, state = tx.update(make_grads(source, scale), state, params)
        return source, scale, optax.apply_updates(params, updates), state

    step = jax.jit(program, donate_argnums=(0, 2, 3))
    params, source = jax.tree.map(jnp.copy, (params, source))
    carry = step(source, jnp.float32(1), params, jax.jit(tx.init)(params))
    first = np.asarray(jax.tree.leaves(carry[2])[0].ravel()[:64], np.float32)
    ms, carry = median_ms(step, carry, repeats)
    release_if_paged(carry[3])
    return first, ms


def kernel_ms(grads, repeats, quantization):
    """Returns the time of the update alone, whose updates are the next call's gradients.

    So nothing is copied.
    """
    tx = scale_by_paged_adam8bit(quantization=quantization)
    step = jax.jit(tx.update, donate_argnums=(0, 1))
    carry = jax.tree.map(jnp.copy, grads), tx.init(grads)
    ms, carry = median_ms(step, carry, repeats)
    release(carry[1])
    return ms


def copy_rate(num_bytes: int, repeats: int) -> float:
    """Returns the bytes per second, read plus written, of a device copy."""
    x = jnp.ones(num_bytes // 4, jnp.float32)
    add = jax.jit(lambda x: (x + 1,), donate_argnums=0)
    return 2 * num_bytes / (1e-3 * median_ms(add, (x,), repeats)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--codec", choices=["dynamic", "ratio"], default=Quantization().codec)
    args = parser.parse_args()
    quantization = Quantization(args.codec)
    on_gpu = jax.default_backend() == "gpu"
    size = 2**28 if on_gpu else 10_000_000
    cases = {
        f"1 x {size / 1e6:.0f}M float32": ([(size,)], jnp.float32),
        f"1 x {size / 1e6:.0f}M bfloat16": ([(size,)], jnp.bfloat16),
        "1120 x 4096x16 float32": ([(4096, 16)] * 1120, jnp.float32),
    }
    rate = copy_rate(2**30 if on_gpu else 2**26, args.repeats)
    print(f"{jax.devices()[0].device_kind}, copy {rate / 1e9:.0f} GB/s (read + write)")
    header = ("ms", "gradients", "+ adamw", "+ paged", "ratio", "+ on host", "kernel", "of copy")
    print(f"{header[0]:<24}" + "".join(f"{h:>13}" for h in header[1:]))
    for name, (shapes, dtype) in cases.items():
        keys = jax.random.split(jax.random.key(0), len(shapes))
        grads = [jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes, strict=True)]
        params = [jnp.ones(s, dtype) for s in shapes]
        making = making_ms(grads, args.repeats)
        expected, theirs = full_step(optax.adamw(1e-3), params, grads, args.repeats)
        first, ours = full_step(
            paged_adamw8bit(1e-3, quantization=quantization), params, grads, args.repeats
        )
        np.testing.assert_allclose(first, expected, rtol=1e-2)
        hosted = None
        if on_gpu:
            tx = paged_adamw8bit(1e-3, quantization=quantization, paging=Paging(device_bytes=0))
            hosted = full_step(tx, params, grads, args.repeats)[1]
        kernel = kernel_ms(grads, args.repeats, quantization)
        nbytes = sum(g.size * (2 * g.dtype.itemsize + 4) for g in grads)
        row = [f"{making:.2f}", f"{theirs:.2f}", f"{ours:.2f}", f"{ours / theirs:.2f}"]
        row += [f"{hosted:.2f}" if hosted else "-", f"{kernel:.2f}"]
        row += [f"{nbytes / (1e-3 * kernel) / rate:.0%}"]
        print(f"{name:<24}" + "".join(f"{cell:>13}" for cell in row))


if __name__ == "__main__":
    main()
