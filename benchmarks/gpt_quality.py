"""Does a GPT learn as well with paged optimizers as with `optax.adamw`? Compares held-out losses.

    python benchmarks/gpt_quality.py                       # 33M parameters; wants a GPU
    python benchmarks/gpt_quality.py --runs adamw paged    # some of the runs
    python benchmarks/gpt_quality.py --tiny --steps 40     # a trial on a CPU

It trains the GPT of `numerics.py` on the source of Python's standard library for 1,000 steps. Every
optimizer starts from the same weights and sees the same batches, once for each seed. The benchmark
prints the held-out loss of each run and how far it is from optax's optimizer with float32
parameters. Compare this with the distance between the seeds of optax's, which it prints too. It
writes `--json` after every run. All runs of a seed come before the next seed.
"""

import argparse
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numerics import WEIGHT_DECAY, Gpt

from paged_optax import Quantization, paged_adamw8bit, paged_lion8bit, release_all


class Run(NamedTuple):
    optimizer: Callable
    dtype: str  # of the parameters
    what: str
    baseline: str = "adamw"  # the run that it is compared with
    peak: float | None = None  # of the learning rate, if not the model's


def _paged(**options):
    return functools.partial(paged_adamw8bit, **options)


def _lion(optimizer, what):
    return Run(optimizer, "float32", what, "lion", 3e-4)


_DYNAMIC = Quantization("dynamic")
RUNS = {
    "adamw": Run(optax.adamw, "float32", "optax.adamw"),
    "paged": Run(_paged(), "float32", "paged_adamw8bit"),
    "dynamic": Run(_paged(quantization=_DYNAMIC), "float32", "paged_adamw8bit, codec dynamic"),
    "ratio6": Run(
        _paged(quantization=Quantization("ratio6")), "float32", "paged_adamw8bit, ratio6"
    ),
    "ratio4": Run(
        _paged(quantization=Quantization("ratio4")), "float32", "paged_adamw8bit, ratio4"
    ),
    "compensated": Run(
        _paged(param_rounding="compensated"), "bfloat16", "paged_adamw8bit, compensated"
    ),
    "stochastic": Run(
        _paged(param_rounding="stochastic"), "bfloat16", "paged_adamw8bit, stochastic"
    ),
    "nearest": Run(_paged(), "bfloat16", "paged_adamw8bit"),
    "adamw-bfloat16": Run(optax.adamw, "bfloat16", "optax.adamw"),
    "lion": _lion(optax.lion, "optax.lion"),
    "paged-lion": _lion(paged_lion8bit, "paged_lion8bit"),
    "dynamic-lion": _lion(
        functools.partial(paged_lion8bit, quantization=_DYNAMIC), "paged_lion8bit, codec dynamic"
    ),
}
CHUNK = 100  # steps in one program


class TinyGpt(Gpt):
    layers, width, heads, vocabulary, time_steps, batch = 2, 64, 4, 512, 64, 8


class Trainer:
    """One optimizer on one model: a program for `CHUNK` steps, and one for the held-out loss."""

    def __init__(self, model: Gpt, run: Run, steps: int):
        self.model, self.steps, self.dtype = model, steps, jnp.dtype(run.dtype)
        warmup = max(1, steps // 10)
        peak = run.peak or model.peak
        rate = optax.warmup_cosine_decay_schedule(peak / warmup, peak, warmup, steps, peak / 10)
        optimizer = run.optimizer(rate, weight_decay=WEIGHT_DECAY)
        self.tx = optax.chain(optax.clip_by_global_norm(1.0), optimizer)
        self.learn, self.held_out = jnp.asarray(model.learn), jnp.asarray(model.held_out)
        self.advance = jax.jit(self._advance, donate_argnums=(0, 1))
        self.evaluate = jax.jit(self._evaluate)

    def _windows(self, ids, starts):
        return ids[starts[:, None] + jnp.arange(self.model.time_steps + 1)]

    def _advance(self, params, state, learn, starts):
        def step(carry, starts):
            params, state = carry
            ids = self._windows(learn, starts)
            loss, grads = jax.value_and_grad(self.model.loss)(params, ids)
            updates, state = self.tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), loss

        (params, state), losses = jax.lax.scan(step, (params, state), starts)
        return params, state, losses

    def _evaluate(self, params, held_out, starts):
        def loss(starts):
            return self.model.loss(params, self._windows(held_out, starts))

        return jnp.mean(jax.lax.map(loss, starts))

    def train(self, seed: int, batches: int = 16):
        """Returns the training losses of all steps and the held-out loss."""
        model = self.model
        params = jax.tree.map(lambda x: x.astype(self.dtype), jax.jit(lambda: model.init(seed))())
        state = self.tx.init(params)
        last = len(model.learn) - model.time_steps - 1
        starts = np.random.default_rng(seed).integers(last, size=(self.steps, model.batch))
        losses = []
        for first in range(0, self.steps, CHUNK):
            chunk = jnp.asarray(starts[first : first + CHUNK], jnp.int32)
            params, state, loss = self.advance(params, state, self.learn, chunk)
            losses.append(loss)
        spread = np.linspace(0, len(model.held_out) - model.time_steps - 1, batches * model.batch)
        held_out = self.evaluate(
            params, self.held_out, jnp.asarray(spread.reshape(batches, -1), jnp.int32)
        )
        result = np.concatenate(losses).tolist(), float(held_out)
        release_all()
        return result


def print_table(results: dict[str, dict], seeds: list[int]) -> None:
    print("\nheld-out loss by seed; 'less' is the mean minus that of optax's optimizer in float32")
    print(
        f"{'optimizer':<34}{'parameters':<11}"
        + "".join(f"{f'seed {seed}':>9}" for seed in seeds)
        + f"{'mean':>9}{'less':>9}"
    )
    means = {name: np.mean([row["held_out"] for row in rows.values()])
             for name, rows in results.items()}  # fmt: skip
    for name, rows in results.items():
        losses = [rows[str(s)]["held_out"] if str(s) in rows else np.nan for s in seeds]
        less = means[name] - means.get(RUNS[name].baseline, np.nan)
        print(
            f"{RUNS[name].what:<34}{RUNS[name].dtype:<11}"
            + "".join(f"{loss:>9.4f}" for loss in losses)
            + f"{means[name]:>9.4f}{less:>+9.4f}"
        )
    for name in {RUNS[name].baseline for name in results} & set(results):
        losses = [row["held_out"] for row in results[name].values()]
        print(f"the seeds of {RUNS[name].what} are {max(losses) - min(losses):.4f} apart")


def main(argv=None) -> None:
    """Does the runs that the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--runs", nargs="+", choices=list(RUNS), default=list(RUNS), help="default: all")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: 0 1 2")
    add("--steps", type=int, default=1000, help=f"multiple of {CHUNK}, or less (default: 1000)")
    add("--tiny", action="store_true", help="a model of 0.2M parameters, for a trial on a CPU")
    add("--json", type=Path, metavar="FILE", help="writes all losses, after every run")
    args = parser.parse_args(argv)
    if args.steps < 1 or (args.steps > CHUNK and args.steps % CHUNK):
        parser.error(f"argument --steps: {args.steps} is not a multiple of {CHUNK}")
    model = TinyGpt() if args.tiny else Gpt()
    shapes = jax.eval_shape(lambda: model.init(0))
    num_parameters = sum(x.size for x in jax.tree.leaves(shapes))
    device = jax.local_devices()[0].device_kind
    print(
        f"jax {jax.__version__} on {device}; GPT of {num_parameters:,} parameters, {args.steps} "
        f"steps; text of {len(model.learn):,} tokens"
    )
    results: dict[str, dict] = {}
    trainers = {name: Trainer(model, RUNS[name], args.steps) for name in args.runs}
    for seed in args.seeds:
        for name, trainer in trainers.items():
            start = time.perf_counter()
            losses, held_out = trainer.train(seed)
            seconds = time.perf_counter() - start
            results.setdefault(name, {})[str(seed)] = {"held_out": held_out, "losses": losses}
            print(
                f"{name:<16}seed {seed}: held-out {held_out:.4f}, last 50 steps "
                f"{np.mean(losses[-50:]):.4f} [{seconds:.0f} s]",
                flush=True,
            )
            if args.json:
                report = {"jax": jax.__version__, "device": device, "steps": args.steps}
                args.json.write_text(json.dumps(report | {"runs": results}, indent=1))
    print_table(results, args.seeds)


if __name__ == "__main__":
    main()
