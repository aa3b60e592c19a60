"""A Llama shape on 1, 2, ... GPUs, with parameters, gradients and moments in shards (FSDP).

    python benchmarks/several_gpus.py [--shape 8b] [--gpus 1 2] [--optimizer resident host adamw]
    python benchmarks/several_gpus.py --together         # the same in less time
    python benchmarks/several_gpus.py --processes        # one process a GPU (jax.distributed, NCCL)
    python benchmarks/several_gpus.py --method qlora --shape 65b --batch 2

`fsdp.py` has the training. All rows train on the same data, with the same number of tokens a step.
Every row is a process of its own, or one a GPU, so that its memory is its own as well. `--together`
starts one for all optimizers, which is faster; "XLA" then is the largest of the rows so far.

    resident    paged_adamw8bit, moments in GPU memory
    half, host  the same with half of the moments, or all of them, in pinned host memory
    adamw       optax.adamw

With "full" all weights are trained: in bfloat16, compensated by paged_adamw8bit, while optax.adamw
keeps bfloat16 moments. With "qlora" the weights are NF4, and float32 adapters are trained.

"step" is a whole training step, queued without waiting. "update" is the optimizer's step alone: in
place (`apply_gradients`), or with the application of optax's updates. The host waits before and
after it. "XLA" is the most that XLA's pool had in use on a GPU. "link" is the rate at which
each GPU moves its moments on the host, in either direction, while all GPUs do the same. "of linear"
compares tokens per second with those of the first number of GPUs.
"""

import argparse
import functools
import gc
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import fsdp
import jax
import optax

from paged_optax import Paging, memory_report, paged_adamw8bit, release

GIB = 2**30
OPTIMIZERS = ["resident", "half", "host", "adamw"]
WARM_UP = 2  # steps
PASSED_ON = ("shape", "method", "batch", "length", "steps", "lr")  # from the parent to its children


# --------------------------------------------------------------------------- one row, in a child


def make_tx(optimizer: str, lr: float, rounding: str, moment_bytes: int):
    """The optimizer of a row; `moment_bytes` are those of one GPU."""
    schedule = optax.linear_schedule(0.0, lr, 5)
    if optimizer == "adamw":
        return optax.adamw(schedule)
    paging = {
        "resident": Paging(),
        "half": Paging(device_bytes=moment_bytes // 2, memory="pinned"),
        "host": Paging(device_bytes=0, memory="pinned"),
    }[optimizer]
    return paged_adamw8bit(schedule, param_rounding=rounding, paging=paging)


def train(training: fsdp.Training, data, steps: int) -> dict:
    """Trains; returns losses, and times in seconds."""
    losses = [training.step(next(data)) for _ in range(WARM_UP)]
    gradients, updates = [], []
    for _ in range(steps):  # the two programs one by one
        ids = jax.block_until_ready(next(data))
        jax.block_until_ready((training.trained, training.state))
        times = [time.perf_counter()]
        loss, grads = jax.block_until_ready(training.grad(training.frozen, training.trained, ids))
        times.append(time.perf_counter())
        training.trained, training.state = jax.block_until_ready(
            training.update(training.trained, training.state, grads)
        )
        times.append(time.perf_counter())
        del grads
        losses.append(loss)
        gradients.append(times[1] - times[0])
        updates.append(times[2] - times[1])
    batches = jax.block_until_ready([next(data) for _ in range(steps)])
    start = time.perf_counter()
    losses += [training.step(ids) for ids in batches]
    jax.block_until_ready((training.trained, training.state))
    step = (time.perf_counter() - start) / steps
    return {
        "losses": [float(loss) for loss in losses],
        "gradient": statistics.median(gradients),
        "update": statistics.median(updates),
        "step": step,
    }


def measure(args: argparse.Namespace, optimizer: str) -> dict:
    """Returns the figures of a row, with bytes by GPU of this process."""
    config = fsdp.SHAPES[args.shape]
    _, trained = jax.eval_shape(functools.partial(fsdp.make_weights, config, args.method))
    size = sum(x.size for x in jax.tree.leaves(trained))
    compensated = args.method == "full"
    per_block = 2 * 256 + 2 * 4 + 256 * compensated
    rounding = "compensated" if compensated else "nearest"
    tx = make_tx(optimizer, args.lr, rounding, size * per_block // 256 // args.gpus[0])
    data = fsdp.batches(args.batch, args.length)
    training = fsdp.begin(config, args.method, tx, next(data), optimizer != "adamw")
    row = {"trained": size} | train(training, data, args.steps)
    devices = jax.local_devices()[: args.gpus[0]]
    row["xla"] = [(d.memory_stats() or {}).get("peak_bytes_in_use", 0) for d in devices]
    row["resident"] = row["on_host"] = [0] * len(devices)
    if optimizer != "adamw":
        report = memory_report(training.state)
        row["resident"] = [device.resident for device in report.devices]
        row["on_host"] = [device.on_host for device in report.devices]
        row["elsewhere"] = report.elsewhere
        release(training.state)
    return row


def child(args: argparse.Namespace) -> None:
    if args.rank is not None:
        jax.distributed.initialize(
            f"localhost:{args.port}", args.gpus[0], args.rank, local_device_ids=[args.rank]
        )
    with jax.set_mesh(fsdp.make_mesh(args.gpus[0])):
        for optimizer in args.optimizer:
            print(json.dumps(measure(args, optimizer)), flush=True)
            gc.collect()  # arrays of this row


# -------------------------------------------------------------------- all rows, in the parent


def start(args: argparse.Namespace, num_gpus: int, optimizers: list[str], cache: str) -> list:
    """Starts a process that measures rows, or one for each GPU."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, __file__, "--child", "--gpus", str(num_gpus), "--port", str(port)]
    command += ["--optimizer", *optimizers]
    for name in PASSED_ON:
        command += [f"--{name}", str(getattr(args, name))]
    environment = os.environ | {
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "JAX_COMPILATION_CACHE_DIR": cache,  # rows share the program of the gradients
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1",
    }
    ranks = [["--rank", str(i)] for i in range(num_gpus)] if args.processes else [[]]
    return [
        subprocess.Popen([*command, *rank], env=environment, stdout=subprocess.PIPE, text=True)
        for rank in ranks
    ]


def read_rows(children: list) -> Iterator[dict]:
    """Yields each row when all processes have measured it."""
    outputs = [(line for line in child.stdout if line.startswith("{")) for child in children]
    for lines in zip(*outputs, strict=False):
        rows = [json.loads(line) for line in lines]
        for name in ("xla", "resident", "on_host"):
            rows[0][name] = [x for row in rows for x in row[name]]
        yield rows[0]
    for child in children:
        child.wait()


def rows_of(args: argparse.Namespace, num_gpus: int, cache: str) -> Iterator[tuple]:
    """Yields (optimizer, figures) as they are measured; figures are None if there are none."""
    groups = [args.optimizer] if args.together else [[name] for name in args.optimizer]
    for optimizers in groups:
        rows = read_rows(start(args, num_gpus, optimizers, cache))
        yield from itertools.zip_longest(optimizers, rows)


def gib(values: list[int]) -> str:
    """The largest of the GPUs' numbers of bytes."""
    return f"{max(values) / GIB:.2f}"


COLUMNS = {
    "tokens/s": lambda row: f"{row['tokens']:,.0f}",
    "of linear": lambda row: f"{row['linear']:.0%}",
    "step, ms": lambda row: f"{1e3 * row['step']:,.0f}",
    "update, ms": lambda row: f"{1e3 * row['update']:,.1f}",
    "XLA, GiB": lambda row: gib(row["xla"]),
    "resident": lambda row: gib(row["resident"]),
    "on host": lambda row: gib(row["on_host"]),
    "link, GB/s": lambda row: f"{max(row['on_host']) / row['update'] / 1e9:.1f}",
    "last loss": lambda row: f"{row['losses'][-1]:.3f}",
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=fsdp.SHAPES, default="8b")
    parser.add_argument("--method", choices=["full", "qlora"], default="full")
    parser.add_argument("--gpus", type=int, nargs="+", help="default: 1, 2, 4, ... as there are")
    parser.add_argument("--optimizer", nargs="+", choices=OPTIMIZERS, default=OPTIMIZERS)
    parser.add_argument("--processes", action="store_true", help="one process a GPU")
    parser.add_argument("--together", action="store_true", help="one process for all optimizers")
    parser.add_argument("--batch", type=int, default=8, help="sequences a step, on all GPUs")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a sequence")
    parser.add_argument("--steps", type=int, default=4, help="that are timed, twice")
    parser.add_argument("--lr", type=float, default=1e-5)
    for name in ("--rank", "--port"):
        parser.add_argument(name, type=int, help=argparse.SUPPRESS)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def count_devices() -> int:
    """How many devices there are, found out by a process that ends: it takes memory of each."""
    command = [sys.executable, "-c", "import jax; print(jax.device_count())"]
    return int(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


def main() -> None:
    args = parse_args()
    if args.child:
        child(args)
        return
    gpus = args.gpus or [n for n in (1, 2, 4, 8) if n <= count_devices()]
    how = "one process a GPU" if args.processes else "one process"
    print(f"{args.shape}, {args.method}, {how}, {args.batch * args.length:,} tokens a step")
    print(f"{'GPUs':<6}{'optimizer':<10}" + "".join(f"{name:>12}" for name in COLUMNS))
    first: dict[str, float] = {}  # tokens per second and GPU
    with tempfile.TemporaryDirectory() as cache:
        for num_gpus in gpus:
            for optimizer, row in rows_of(args, num_gpus, cache):
                cells = "   failed"
                if row is not None:
                    row["tokens"] = args.batch * args.length / row["step"]
                    row["linear"] = (
                        row["tokens"]
                        / num_gpus
                        / first.setdefault(optimizer, row["tokens"] / num_gpus)
                    )
                    cells = "".join(f"{cell(row):>12}" for cell in COLUMNS.values())
                print(f"{num_gpus:<6}{optimizer:<10}{cells}", flush=True)


if __name__ == "__main__":
    main()
