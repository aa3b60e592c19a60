"""Times a step where dispatch dominates: 1,120 leaves, as in a LoRA fine-tuning of a large model.

    python benchmarks/dispatch.py [--repeats N]

One jitted program does update, decay and apply, with everything donated. It takes turns with
optax.adamw in the same run. Gradients come in from outside, and updates go out as the next
gradients, so the program makes and copies nothing else. Leaves have 4096 x 16 elements on a GPU, so
that one launch over all of them has work to do, and 16 elements on a CPU.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from paged_optax import Quantization, paged_adamw8bit, release

LEAVES = 1120
STEPS = 10  # queued in a row and timed together


def make_step(tx):
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, updates

    return jax.jit(step, donate_argnums=(0, 1, 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    shape = (4096, 16) if jax.default_backend() == "gpu" else (16,)

    optimizers = {
        "optax.adamw": optax.adamw(1e-3),
        "paged_adamw8bit": paged_adamw8bit(1e-3),
        "paged_adamw8bit, replay": paged_adamw8bit(1e-3, replay=True),
        "paged_adamw8bit, all in 8 bits": paged_adamw8bit(
            1e-3, quantization=Quantization(min_size=0)
        ),
    }
    carries, steps, times = {}, {}, {name: [] for name in optimizers}
    compiling = {}
    for name, tx in optimizers.items():
        params = [jnp.ones(shape) for _ in range(LEAVES)]
        steps[name] = make_step(tx)
        start = time.perf_counter()
        carries[name] = steps[name](params, jax.jit(tx.init)(params), [x + 1 for x in params])
        jax.block_until_ready(carries[name])
        compiling[name] = time.perf_counter() - start
    for name in optimizers:
        first = np.asarray(carries[name][0][0])
        np.testing.assert_allclose(first, carries["optax.adamw"][0][0], rtol=1e-6)
    for _ in range(args.repeats):
        for name in optimizers:  # in turns, so that other load on the machine hits all alike
            start = time.perf_counter()
            for _ in range(STEPS):
                carries[name] = steps[name](*carries[name])
            jax.block_until_ready(carries[name])
            times[name].append((time.perf_counter() - start) / STEPS)

    print(f"{jax.devices()[0].device_kind}, {LEAVES} leaves of {'x'.join(map(str, shape))}")
    print(f"{'ms a step, median':<32}{'ms':>8}{'ratio':>8}{'first call, s':>16}")
    base = statistics.median(times["optax.adamw"])
    for name in optimizers:
        median = statistics.median(times[name])
        print(f"{name:<32}{1e3 * median:>8.2f}{median / base:>8.2f}{compiling[name]:>16.1f}")
        if name != "optax.adamw":
            release(carries[name][1])


if __name__ == "__main__":
    main()
