"""Measures what bfloat16 parameters that learn cost, and how well they follow float32.

    python benchmarks/param_rounding.py [--repeats N]

"step" is a whole optimizer step (update, weight decay, apply) of one tensor, jitted and donated.
optax.adamw steps bfloat16 and float32 parameters in the same run; "of f32" divides by the time with
float32. "lost" says what 1,000 noisy steps lose, at two learning rates. It is the root mean square
of the distance to float32 parameters that got the same gradients, divided by how far those moved.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax
from step_time import full_step

from paged_optax import Quantization, memory_report, paged_adam8bit, paged_adamw8bit, release

MODES = ("nearest", "stochastic", "compensated")
STEPS, SIZE, START = 1000, 4096, 0.05


def train(mode, dtype, learning_rate):
    """Returns the parameters after noisy steps with a drift, as float32."""
    tx = paged_adam8bit(
        learning_rate, param_rounding=mode, quantization=Quantization(min_size=SIZE + 1)
    )
    params = {"p": jnp.full(SIZE, START, dtype)}
    drift = 0.3 * jax.random.normal(jax.random.key(1), (SIZE,))

    @jax.jit
    def run(params, state):
        def step(carry, key):
            params, state = carry
            grad = (drift + jax.random.normal(key, (SIZE,))).astype(jnp.bfloat16)
            updates, state = tx.update({"p": grad.astype(dtype)}, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), jax.random.split(jax.random.key(0), STEPS))[0]

    params, state = run(params, tx.init(params))
    release(state)
    return np.asarray(params["p"], np.float32)


def lost(mode, learning_rate):
    exact = train("nearest", jnp.float32, learning_rate)
    error = train(mode, jnp.bfloat16, learning_rate) - exact
    return np.sqrt(np.mean(error**2) / np.mean((exact - np.float32(START)) ** 2))


def bytes_per_parameter(mode, size):
    params = jnp.ones(size, jnp.bfloat16)
    tx = paged_adamw8bit(1e-3, param_rounding=mode)
    state = tx.update(params, tx.init(params), params)[1]
    total = memory_report(state).total
    release(state)
    return total / size


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()
    size = 2**28 if jax.default_backend() == "gpu" else 10_000_000
    rates = (1e-4, 1e-5)
    grads = jax.random.normal(jax.random.key(0), (size,), jnp.float32)
    params = jnp.ones(size, jnp.float32)
    expected, float32_ms = full_step(optax.adamw(1e-1), [params], [grads], args.repeats)
    rows = {"optax.adamw, float32": (float32_ms, "8.00", [])}
    grads, params = grads.astype(jnp.bfloat16), params.astype(jnp.bfloat16)
    _, ms = full_step(optax.adamw(1e-1), [params], [grads], args.repeats)
    rows["optax.adamw, bfloat16"] = (ms, "4.00", [])
    for mode in MODES:
        tx = paged_adamw8bit(1e-1, param_rounding=mode)
        first, ms = full_step(tx, [params], [grads], args.repeats)
        np.testing.assert_allclose(first, expected, rtol=2**-7)
        state_bytes = f"{bytes_per_parameter(mode, size):.2f}"
        rows[f"paged, {mode}"] = (ms, state_bytes, [lost(mode, rate) for rate in rates])
    print(f"{jax.devices()[0].device_kind}, {size / 1e6:.0f}M parameters, {STEPS} steps")
    header = ["step ms", "of f32", "B/param", *(f"lost, lr {rate:g}" for rate in rates)]
    print(f"{'':<24}" + "".join(f"{h:>15}" for h in header))
    for name, (ms, state_bytes, losses) in rows.items():
        cells = [f"{ms:.2f}", f"{ms / float32_ms:.2f}", state_bytes]
        cells += [f"{x:.1%}" for x in losses] or ["-"] * len(rates)
        print(f"{name:<24}" + "".join(f"{cell:>15}" for cell in cells))


if __name__ == "__main__":
    main()
