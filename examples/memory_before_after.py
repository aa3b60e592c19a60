"""A full fine-tuning that runs out of GPU memory with optax.adamw, and runs with paged moments.

XLA's pool is capped so that parameters, gradients and what a step needs besides have room in it,
but not the two float32 moments of optax.adamw on top: at 14 bytes a parameter, where a step takes
less than 12 without the moments, which are another 8. The same training is started twice, each time
in a process of its own, first with `optax.adamw` and then with `paged_adamw8bit`, whose moments lie
outside of the pool. Only that one line differs. Meanwhile the memory of the GPU is sampled, as
nvidia-smi shows it, and drawn.

The model has random weights, in place of a checkpoint, and learns the source code of Python's
standard library, byte by byte. Needs an NVIDIA GPU with some 10 GiB free. Try::

    python examples/memory_before_after.py --layers 16
"""

import argparse
import dataclasses
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import optax
import pynvml
from finetuning import contents, split, windows
from flax import nnx
from matplotlib.figure import Figure
from tiny_llama import Config, Llama, train_step
from tqdm import tqdm

from paged_optax import memory_report, paged_adamw8bit
from paged_optax._ext import cuda_info  # the devices as JAX numbers them

GIB = 2**30
BYTES_PER_PARAMETER = 14  # in XLA's pool
SAMPLES_PER_SECOND = 20
OUT_OF_MEMORY = 3  # exit status of a training
OPTIMIZERS = {"optax.adamw": optax.adamw, "paged_adamw8bit": paged_adamw8bit}


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
    print(f"loss {losses[0]:.3f} at first, {np.mean(losses[-5:]):.3f} at last")
    if args.optimizer == "paged_adamw8bit":
        print(memory_report(optimizer))
    return 0


# ----------------------------------------------------------------------- watching it, in the parent


@dataclasses.dataclass
class Outcome:
    status: int
    output: str
    seconds: list[float]
    used: list[float]  # GiB, by all of the GPU's processes


def watch(command: list[str], env: dict[str, str], gpu) -> Outcome:
    """Runs a training and samples the GPU's memory until it ends."""
    outcome = Outcome(0, "", [], [])
    done = threading.Event()

    def sample():
        start = time.monotonic()
        while not done.is_set():
            outcome.seconds.append(time.monotonic() - start)
            outcome.used.append(int(pynvml.nvmlDeviceGetMemoryInfo(gpu).used) / GIB)
            done.wait(1 / SAMPLES_PER_SECOND)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        process = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True)
    finally:
        done.set()
        thread.join()
    outcome.status, outcome.output = process.returncode, process.stdout
    return outcome


def plot(outcomes: dict[str, Outcome], before: float, cap: float, out: Path) -> None:
    figure = Figure(figsize=(8, 5), layout="constrained")  # without pyplot: needs no display
    axes = figure.subplots()
    for name, outcome in outcomes.items():
        end = "out of memory" if outcome.status == OUT_OF_MEMORY else "runs"
        (line,) = axes.plot(outcome.seconds, outcome.used, label=f"{name}: {end}")
        if outcome.status == OUT_OF_MEMORY:
            axes.plot(outcome.seconds[-1], max(outcome.used), "x", color=line.get_color(), ms=12)
    axes.axhline(before + cap, color="gray", ls="--", label=f"XLA's pool may have {cap:.1f} GiB")
    axes.set(
        title="Memory of the GPU during a full fine-tuning",
        xlabel="seconds",
        ylabel="GiB in use",
        ylim=(0, 1.2 * (before + cap)),
    )
    axes.legend(loc="upper left")
    figure.savefig(out, dpi=120)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="A full fine-tuning that fits with paged_adamw8bit only.",
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
        help="to learn",
        default=argparse.SUPPRESS,
    )
    parser.add_argument("--out", type=Path, default=Path("memory_before_after.png"))
    parser.add_argument("--optimizer", choices=OPTIMIZERS, help="train with one of them, unwatched")
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
        print(f"this needs an NVIDIA GPU: its memory is what is compared ({error})")
        return 1
    gpu = pynvml.nvmlDeviceGetHandleByPciBusId(cuda_info()["devices"][0]["pci_bus_id"].encode())
    memory = pynvml.nvmlDeviceGetMemoryInfo(gpu)

    parameters = parameters_of(config_of(args))
    cap = BYTES_PER_PARAMETER * parameters
    needed = cap + 4 * parameters + GIB
    if needed > int(memory.free):
        print(
            f"{int(memory.free) / GIB:.1f} GiB of the GPU are free and {needed / GIB:.1f} GiB are"
            " needed; take fewer --layers"
        )
        return 1
    print(
        f"{parameters / 1e6:.0f}M float32 parameters; XLA's pool may have {cap / GIB:.2f} GiB,"
        f" float32 moments take {8 * parameters / GIB:.2f} GiB\n"
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
        print(f"{name}: at most {max(outcome.used):.2f} GiB of the GPU\n{outcome.output}")
    plot(outcomes, int(memory.used) / GIB, cap / GIB, args.out)
    print(f"plot saved as {args.out}")
    as_expected = [outcome.status for outcome in outcomes.values()] == [OUT_OF_MEMORY, 0]
    if not as_expected:
        print(
            "that is NOT what this example is to show: optax.adamw fails and paged_adamw8bit runs"
        )
    return 0 if as_expected else 1


if __name__ == "__main__":
    sys.exit(main())
