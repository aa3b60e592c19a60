"""How far the directions of paged optimizers are from float32's, on the gradients of a real model.

    python benchmarks/family_error.py [--steps 2500] [--optimizer NAME ...]

A small GPT on program text trains with optax's optimizer in float32. Paged optimizers get the same
gradients and are carried along: nothing of theirs reaches the parameters. The table has, over the
second half of the run, the squared error of their directions relative to the squared directions,
and for optimizers that take signs the share of elements whose sign differs.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numerics
import numpy as np
import optax

import paged_optax
from paged_optax import Quantization

CHUNK = 50  # steps of one program
FORMATS = ("ratio", "dynamic", "bfloat16")


class Tiny(numerics.Gpt):
    """233,792 parameters."""

    layers, width, heads, vocabulary, time_steps, batch = 2, 64, 2, 1024, 64, 16


# The direction in optax and here, the largest learning rate, the weight decay, and whether the
# direction is a sign.
OPTIMIZERS: dict[str, tuple[Any, Callable[..., Any], float, float, bool]] = {
    "adam": (optax.scale_by_adam(), paged_optax.scale_by_paged_adam8bit, 2e-3, 0.01, False),
    "lion": (optax.scale_by_lion(), paged_optax.scale_by_paged_lion8bit, 3e-4, 0.03, True),
    "momentum": (
        optax.trace(0.9),
        functools.partial(paged_optax.scale_by_paged_trace8bit, 0.9),
        0.5,
        0.0,
        False,
    ),
    "ema": (
        optax.ema(0.95),
        functools.partial(paged_optax.scale_by_paged_ema8bit, 0.95),
        2.0,
        0.0,
        False,
    ),
    "signum": (
        optax.chain(optax.ema(0.9, debias=False), optax.scale_by_sign()),
        paged_optax.scale_by_paged_signum8bit,
        3e-4,
        0.03,
        True,
    ),
    "rmsprop": (
        optax.scale_by_rms(0.99),
        functools.partial(paged_optax.scale_by_paged_rms8bit, 0.99),
        1e-3,
        0.0,
        False,
    ),
    "centered": (
        optax.scale_by_stddev(0.99),
        functools.partial(paged_optax.scale_by_paged_stddev8bit, 0.99),
        1e-3,
        0.0,
        False,
    ),
    "adagrad": (
        optax.scale_by_rss(0.0),
        functools.partial(paged_optax.scale_by_paged_rss8bit, 0.0),
        2e-2,
        0.0,
        False,
    ),
    "ademamix": (
        optax.contrib.scale_by_ademamix(alpha=5.0),
        functools.partial(paged_optax.scale_by_paged_ademamix8bit, alpha=5.0),
        1e-3,
        0.01,
        False,
    ),
}


def measure(model, name: str, num_steps: int) -> tuple[float, list[float]]:
    """The last loss, and the error of each format."""
    direction, paged, peak, decay, is_sign = OPTIMIZERS[name]
    rate = optax.warmup_cosine_decay_schedule(0, peak, num_steps // 10, num_steps, peak * 0.1)
    clip = optax.clip_by_global_norm(1.0)
    rest = optax.chain(optax.add_decayed_weights(decay), optax.scale_by_learning_rate(rate))
    carried = [paged(quantization=Quantization(format, min_size=0)) for format in FORMATS]

    def error(u, v):
        pairs = zip(jax.tree.leaves(u), jax.tree.leaves(v), strict=True)
        if is_sign:
            return jnp.asarray(sum(jnp.sum(a != b) for a, b in pairs), jnp.float32)
        return sum(jnp.sum((a - b) ** 2) for a, b in pairs)

    def step(carry, ids):
        params, states, others = carry
        loss, grads = jax.value_and_grad(model.loss)(params, ids)
        grads, _ = clip.update(grads, clip.init(params))
        wanted, first = direction.update(grads, states[0], params)
        updates, second = rest.update(wanted, states[1], params)
        sums, after = [], []
        for tx, state in zip(carried, others, strict=True):
            found, state = tx.update(grads, state)
            sums.append(error(wanted, found))
            after.append(state)
        sizes = sum(leaf.size for leaf in jax.tree.leaves(wanted))
        total = sizes if is_sign else sum(jnp.sum(x**2) for x in jax.tree.leaves(wanted))
        out = loss, jnp.stack([*sums, jnp.asarray(total, jnp.float32)])
        return (optax.apply_updates(params, updates), (first, second), after), out

    run = jax.jit(lambda carry, ids: jax.lax.scan(step, carry, ids), donate_argnums=0)
    params = model.init(0)
    states = direction.init(params), rest.init(params)
    carry = params, states, [tx.init(params) for tx in carried]
    rng = np.random.default_rng(0)
    losses, sums = [], np.zeros(len(FORMATS) + 1)
    for start in range(0, num_steps, CHUNK):
        starts = rng.integers(len(model.learn) - model.time_steps - 1, size=(CHUNK, model.batch))
        ids = np.stack([numerics.windows(model.learn, row, model.time_steps) for row in starts])
        carry, (loss, found) = run(carry, ids)
        losses.append(float(jnp.mean(loss)))
        if start >= num_steps // 2:
            sums += np.asarray(found, np.float64).sum(axis=0)
    paged_optax.release_all()
    return losses[-1], list(sums[:-1] / sums[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--optimizer", choices=list(OPTIMIZERS), nargs="*", default=[])
    args = parser.parse_args()
    model = Tiny()
    print(f"{args.steps} steps: loss, then the error of {', '.join(FORMATS)}")
    for name in args.optimizer or OPTIMIZERS:
        loss, errors = measure(model, name, args.steps)
        print(f"{name:<10}{loss:7.3f}" + "".join(f"{x:10.1e}" for x in errors), flush=True)


if __name__ == "__main__":
    main()
