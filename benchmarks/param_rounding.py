"""Measures how well bfloat16 parameters that learn follow float32, and their optimizer state.

    python benchmarks/param_rounding.py

"lost" says what 1,000 noisy steps lose, at two learning rates. It is the root mean square of the
distance to float32 parameters that got the same gradients, divided by how far those moved.
`step.py` has the times.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

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
    rates = (1e-4, 1e-5)
    print(f"{jax.devices()[0].device_kind}, {STEPS} steps")
    header = ["B/param", *(f"lost, lr {rate:g}" for rate in rates)]
    print(f"{'':<24}" + "".join(f"{h:>17}" for h in header))
    for mode in MODES:
        cells = [f"{bytes_per_parameter(mode, 10_000_000):.2f}"]
        cells += [f"{lost(mode, rate):.1%}" for rate in rates]
        print(f"{f'paged, {mode}':<24}" + "".join(f"{cell:>17}" for cell in cells))


if __name__ == "__main__":
    main()
