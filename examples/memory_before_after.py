"""A full fine-tuning that runs out of GPU memory with optax.adamw, and runs with paged moments.

XLA's pool is capped at 14 bytes a parameter. Parameters, gradients and the rest of a step take less
than 12 and fit. The two float32 moments of optax.adamw take another 8 and do not fit.

The same training starts twice, each time in a process of its own: first with `optax.adamw`, then
with `paged_adamw8bit`, whose moments live outside of the pool. Only that one line differs. A bar
chart then shows what each needs in the pool and outside of it, and where the pool ends. The memory
of the GPU is sampled as well, as nvidia-smi shows it.

The model has random weights, in place of a checkpoint. It learns the source code of Python's
standard library, byte by byte. This needs an NVIDIA GPU with some 10 GiB free. Try::

    python examples/memory_before_after.py --layers 16
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import optax
import pynvml
from finetuning import contents, split, windows
from flax import nnx
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from tiny_llama import Config, Llama, train_step
from tqdm import tqdm

from paged_optax import memory_report, paged_adamw8bit
from paged_optax._ext import cuda_info  # the devices as JAX numbers them

GIB = 2**30
BYTES_PER_PARAMETER = 14  # in XLA's pool
SAMPLES_PER_SECOND = 20
OUT_OF_MEMORY = 3  # exit status of a training
OPTIMIZERS = {"optax.adamw": optax.adamw, "paged_adamw8bit": paged_adamw8bit}
FLOAT32_MOMENTS = 8  # bytes per parameter
# From the bottom of a bar to its top, in the order in which a training asks for them.
COLORS = {
    "parameters": "tab:blue",
    "moments": "tab:orange",
    "gradients": "tab:green",
    "activations and workspace": "silver",
}


def config_of(args: argparse.Namespace) -> Config:
    return Config(dim=2048, layers=args.layers, heads=16, kv_heads=4, hidden=5632)


def parameters_of(config: Config) -> int:
    model = nnx.eval_shape(lambda: Llama(nnx.Rngs(0), config=config))
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


# ------------------------------------------------------------------------- the training, in a child


def train(args: argparse.Namespace) -> int:
    """Trains all of the model; returns the exit status."""
    try:
        model = Llama(nnx.Rngs(0), config=config_of(args))
        adamw = OPTIMIZERS[args.optimizer]
        optimizer = nnx.Optimizer(model, adamw(1e-4, weight_decay=0.01), wrt=nnx.Param)
        learn, _ = split(args.text)
        rng = np.random.default_rng(0)
        losses = []
        for _ in tqdm(range(args.steps), desc=args.optimizer, unit="step"):
            starts = rng.integers(len(learn) - 129, size=(1, 8))
            loss = train_step(model, optimizer, windows(learn, starts, 128), "bfloat16")
            losses.append(float(loss))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print("out of memory:", str(error).splitlines()[0])
        return OUT_OF_MEMORY
    print(f"loss {losses[0]:.3f} in the first step, {np.mean(losses[-5:]):.3f} in the last ones")
    stats = jax.local_devices()[0].memory_stats() or {}  # None on a CPU
    measured = {"pool": stats.get("peak_bytes_in_use", 0), "outside": 0}
    if args.optimizer == "paged_adamw8bit":
        print(memory_report(optimizer))
        measured["outside"] = memory_report(optimizer).total
    print(json.dumps(measured))  # for the parent, and so the last line
    return 0


# ----------------------------------------------------------------------- watching it, in the parent


@dataclasses.dataclass
class Outcome:
    """How one training ended."""

    status: int
    output: str
    most_used: int  # bytes, by all of the GPU's processes
    pool: int = 0  # bytes of XLA's pool, at most; 0 if the training did not get to its end
    outside: int = 0  # bytes of moments outside of the pool


def watch(command: list[str], env: dict[str, str], gpu) -> Outcome:
    """Runs a training and samples the GPU's memory until it ends."""
    used = [0]
    done = threading.Event()

    def sample():
        while not done.is_set():
            used.append(int(pynvml.nvmlDeviceGetMemoryInfo(gpu).used))
            done.wait(1 / SAMPLES_PER_SECOND)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        process = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True)
    finally:
        done.set()
        thread.join()
    return outcome_of(process.returncode, process.stdout, max(used))


def outcome_of(status: int, output: str, most_used: int) -> Outcome:
    """Takes what a training measured from the last line of its output."""
    text, _, last = output.rstrip().rpartition("\n")
    if not last.startswith("{"):
        return Outcome(status, output, most_used)
    return Outcome(status, text, most_used, **json.loads(last))


def parts_of(outcome: Outcome, parameters: int) -> dict[str, int]:
    """What a training needs in XLA's pool, in bytes by kind."""
    parts = {
        "parameters": 4 * parameters,
        "moments": 0 if outcome.outside else FLOAT32_MOMENTS * parameters,
        "gradients": 4 * parameters,
    }
    # Unknown for a training that ran out of memory: its bar ends lower than the truth.
    parts["activations and workspace"] = max(0, outcome.pool - sum(parts.values()))
    return parts


def draw(axes, x: float, outcome: Outcome, parameters: int, cap: int) -> None:
    """Draws one optimizer's bars: what it needs in the pool at `x`, and outside right of that."""
    top = 0
    for part, size in parts_of(outcome, parameters).items():
        axes.bar(x, size / GIB, bottom=top / GIB, color=COLORS[part], edgecolor="white")
        top += size
    end = {"x": x, "y": top / GIB, "ha": "center", "va": "bottom", "weight": "bold"}
    if outcome.status == OUT_OF_MEMORY:
        too_much = {"color": "white", "alpha": 0.6, "edgecolor": "tab:red", "hatch": "///"}
        axes.bar(x, (top - cap) / GIB, bottom=cap / GIB, **too_much)
        axes.text(s="runs out of memory", color="tab:red", **end)
    else:
        axes.text(s="runs", **end)
    if outcome.outside:
        axes.bar(x + 1, outcome.outside / GIB, color=COLORS["moments"], edgecolor="white")


def plot(outcomes: dict[str, Outcome], parameters: int, cap: int, out: Path) -> None:
    """Saves a bar chart of what each training needs in XLA's pool and outside of it."""
    figure = Figure(figsize=(8, 5), layout="constrained")  # without pyplot: needs no display
    axes = figure.subplots()
    places = [2.5 * number for number in range(len(outcomes))]
    for x, outcome in zip(places, outcomes.values(), strict=True):
        draw(axes, x, outcome, parameters, cap)
    axes.axhline(cap / GIB, color="black", ls="--")
    axes.text(0.5, cap / GIB, f"XLA's pool ends at {cap / GIB:.1f} GiB", va="bottom")
    axes.set(
        title=f"Full fine-tuning of {parameters / 1e6:.0f}M float32 parameters",
        ylabel="GiB of the GPU's memory",
        xlim=(-0.9, places[-1] + 1.6),
        ylim=(0, 1.5 * cap / GIB),
    )
    axes.set_xticks([x + side for x in places for side in (0, 1)])
    axes.set_xticklabels(["in XLA's pool", "outside of it"] * len(places))
    names = axes.secondary_xaxis(-0.07)
    names.set_xticks([x + 0.5 for x in places], list(outcomes), weight="bold")
    names.tick_params(length=0)
    names.spines["bottom"].set_visible(False)
    handles = [Patch(color=color, label=part) for part, color in COLORS.items()]
    axes.legend(handles=handles[::-1], loc="upper right")
    figure.savefig(out, dpi=120)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="A full fine-tuning that fits only with paged_adamw8bit.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    stdlib = sorted(Path(os.__file__).parent.glob("*.py"))
    parser.add_argument("--layers", type=int, default=8, help="45M parameters each")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument(
        "--text",
        type=contents,
        nargs="+",
        metavar="FILE",
        help="what to learn",
        default=argparse.SUPPRESS,
    )
    parser.add_argument("--out", type=Path, default=Path("memory_before_after.png"))
    parser.add_argument(
        "--optimizer", choices=OPTIMIZERS, help="train with this one and watch nothing"
    )
    args = parser.parse_args(argv)
    for name in ("layers", "steps"):
        if getattr(args, name) < 1:
            parser.error(f"argument --{name}: {getattr(args, name)} is below 1")
    if not args.out.absolute().parent.is_dir():
        parser.error(f"argument --out: no folder '{args.out.parent}'; create it first")
    if "text" not in args:
        args.text = [path.read_bytes() for path in stdlib]
    return args


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    if args.optimizer:
        return train(args)
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        print(f"this needs an NVIDIA GPU, whose memory it compares ({error})")
        return 1
    gpu = pynvml.nvmlDeviceGetHandleByPciBusId(cuda_info()["devices"][0]["pci_bus_id"].encode())
    memory = pynvml.nvmlDeviceGetMemoryInfo(gpu)

    parameters = parameters_of(config_of(args))
    cap = BYTES_PER_PARAMETER * parameters
    needed = cap + 4 * parameters + GIB
    if needed > int(memory.free):
        print(
            f"this needs {needed / GIB:.1f} GiB of the GPU and {int(memory.free) / GIB:.1f} GiB are"
            " free; take fewer --layers"
        )
        return 1
    print(
        f"{parameters / 1e6:.0f}M float32 parameters; XLA's pool may take {cap / GIB:.2f} GiB;"
        f" float32 moments take {FLOAT32_MOMENTS * parameters / GIB:.2f} GiB\n"
    )
    env = os.environ | {
        "XLA_PYTHON_CLIENT_MEM_FRACTION": f"{cap / int(memory.total):.4f}",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "TF_CPP_MIN_LOG_LEVEL": "3",  # XLA's own account of an allocation that failed is long
    }
    outcomes = {}
    for name in OPTIMIZERS:
        command = [sys.executable, __file__, *argv, "--optimizer", name]
        outcomes[name] = outcome = watch(command, env, gpu)
        print(f"{name}: at most {outcome.most_used / GIB:.2f} GiB of the GPU\n{outcome.output}\n")
    plot(outcomes, parameters, cap, args.out)
    print(f"plot saved as {args.out}")
    as_expected = [outcome.status for outcome in outcomes.values()] == [OUT_OF_MEMORY, 0]
    if not as_expected:
        print("This is NOT what the example should show: optax.adamw fails, paged_adamw8bit runs.")
    return 0 if as_expected else 1


if __name__ == "__main__":
    sys.exit(main())
