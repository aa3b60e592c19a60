"""Does a GPT of 33M parameters learn as well with Adam's moments in 4 or 6 bits as in float32?

    python benchmarks/below8.py --json losses.json    # wants a GPU
    python benchmarks/below8.py --tiny --steps 40     # a trial on a CPU

It trains the GPT of `numerics.py` with each format of fewer than 8 bits that `moment_formats.py`
has, with the one of 8 bits and with float32. A format rounds the moments to what it could store;
nothing is packed, and nothing of the package runs. All seeds of a format train in one program,
from the same weights and on the same batches as with the other formats. The last table is the
answer: what counts is how far a format is from float32 beside how far the seeds are apart.

`--json` keeps what is done, and what the file has is not done again.
"""

import argparse
import functools
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numerics
import numpy as np
from gpt_quality import TinyGpt
from moment_formats import FLOAT32, SMALL_FORMATS, WINNER, Format

# What a time limit should leave comes first.
FORMATS = [FLOAT32, *SMALL_FORMATS[:3], WINNER, *SMALL_FORMATS[3:5]]
WAIT = 50  # steps that are queued at most


class Trainings:
    """Trainings from several seeds that step together. Arrays have their number in front.

    Gradients are a program of their own, so it is compiled once for all formats.
    """

    def __init__(self, model, steps: int):
        self.training = numerics.Training(model, steps)
        self._learn = jnp.asarray(model.learn)

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(self, params, learn, starts):
        """Losses (seeds,) and gradients (seeds, blocks, 256) of windows that begin at `starts`."""
        model, layout = self.training.model, self.training.layout
        ids = learn[starts[..., None] + jnp.arange(model.time_steps + 1)]
        one = jax.value_and_grad(lambda params, ids: model.loss(layout.unflatten(params), ids))
        return jax.vmap(one)(params, ids)

    @functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(2, 3, 4))
    def step(self, fmt: Format, params, m, v, grads, step):
        """One step of AdamW, after which the moments are what `fmt` stores of them."""
        stored = self.training.layout.num_stored

        def one(params, m, v, grads):
            grads = grads * jnp.minimum(1, 1 / (jnp.sqrt(jnp.sum(grads**2)) + 1e-12))
            m, v = numerics.advance(m, v, grads)
            decayed = numerics.update_of(m, v, step) + numerics.WEIGHT_DECAY * params
            params = params - self.training.rate(step) * decayed
            kept = fmt.store(m[:stored], v[:stored], step)
            m, v = (jnp.concatenate([a, b[stored:]]) for a, b in zip(kept, (m, v), strict=True))
            return params, m, v

        return jax.vmap(one)(params, m, v, grads)

    def run(self, fmt: Format, seeds: list[int]) -> dict[str, dict[str, float]]:
        """Trains, and returns the losses by seed."""
        training, model = self.training, self.training.model
        params = jnp.stack([training.start(seed)[0] for seed in seeds])
        m, v = jnp.zeros_like(params), jnp.zeros_like(params)
        last = len(model.learn) - model.time_steps - 1
        shape = (training.steps, model.batch)
        starts = np.stack([np.random.default_rng(s).integers(last, size=shape) for s in seeds], 1)
        losses = []
        for step, batch in enumerate(starts.astype(np.int32)):
            loss, grads = self.gradients(params, self._learn, batch)
            params, m, v = self.step(fmt, params, m, v, grads, np.int32(step))
            losses.append(loss)
            if step % WAIT == 0:
                loss.block_until_ready()
        curves = np.stack(losses, 1)
        return {
            str(seed): {
                "held_out": training.held_out_loss(params[i]),
                "last 50": float(np.mean(curves[i, -50:])),
            }
            for i, seed in enumerate(seeds)
        }


def print_table(runs: dict[str, dict[str, dict[str, float]]], seeds: list[int]) -> None:
    """The held-out losses, and their distance from float32 with the same seed."""
    print("\nheld-out loss by seed; 'less' is the mean minus that of float32")
    heads = "".join(f"{f'seed {seed}':>9}" for seed in seeds)
    print(f"{'moments':<28}{'bytes':>6}{heads}{'mean':>9}{'less':>9}{'last 50':>10}")
    for fmt in FORMATS:
        rows = runs.get(fmt.name, {})
        losses = [rows.get(str(seed), {}).get("held_out", np.nan) for seed in seeds]
        pairs = [str(s) for s in seeds if str(s) in rows and str(s) in runs.get(FLOAT32.name, {})]
        exact = [runs[FLOAT32.name][seed]["held_out"] for seed in pairs]
        less = np.mean([rows[seed]["held_out"] for seed in pairs]) - np.mean(exact) if pairs else 0
        if rows:
            print(
                f"{fmt.name:<28}{fmt.bytes_per_parameter:>6.2f}"
                + "".join(f"{loss:>9.4f}" for loss in losses)
                + f"{np.nanmean(losses):>9.4f}{less:>+9.4f}"
                + f"{np.mean([row['last 50'] for row in rows.values()]):>10.4f}"
            )
    exact = [row["held_out"] for row in runs.get(FLOAT32.name, {}).values()]
    if exact:
        print(f"the seeds of float32 are {max(exact) - min(exact):.4f} apart")


def main(argv=None) -> None:
    """Trains what the file of `--json` has not yet."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: 0 1 2")
    add("--steps", type=int, default=1000, help="default: 1000")
    add("--tiny", action="store_true", help="a model of 0.2M parameters, for a trial on a CPU")
    add("--json", type=Path, metavar="FILE", help="reads and writes all losses")
    args = parser.parse_args(argv)
    trainings = Trainings(TinyGpt() if args.tiny else numerics.Gpt(), args.steps)
    about = {
        "device": jax.local_devices()[0].device_kind,
        "parameters": trainings.training.layout.num_parameters,
        "steps": args.steps,
    }
    print(f"jax {jax.__version__}, " + ", ".join(f"{key} {x}" for key, x in about.items()))
    report = {**about, "runs": {}}
    if args.json and args.json.exists():
        report = json.loads(args.json.read_text())
        if {key: report[key] for key in about} != about:
            parser.error(f"{args.json} has runs of other kinds")
    for fmt in FORMATS:
        done = report["runs"].setdefault(fmt.name, {})
        seeds = [seed for seed in args.seeds if str(seed) not in done]
        if not seeds:
            continue
        start = time.perf_counter()
        done |= trainings.run(fmt, seeds)
        losses = ", ".join(f"{seed}: {done[str(seed)]['held_out']:.4f}" for seed in seeds)
        print(f"{fmt.name:<28}{losses} [{time.perf_counter() - start:.0f} s]", flush=True)
        if args.json:
            args.json.write_text(json.dumps(report, indent=1))
        print_table(report["runs"], args.seeds)


if __name__ == "__main__":
    main()
