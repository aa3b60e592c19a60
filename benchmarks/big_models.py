"""How large a model can be fine-tuned on a card of a given size: paged moments and optax.adamw.

Every row is a process of its own, and has random weights of a named shape. XLA's pool ends where
the card would: at its size, less the moments that may be resident and 0.75 GiB for CUDA. Each row
is checked against what the driver says the GPU holds (as nvidia-smi shows it). The loss must fall.

"qlora" trains float32 adapters of rank 64 on all seven projections of a base in NF4; the optimizer
is the one line that differs. "full" trains all parameters in bfloat16, with paged moments in place
(`apply_gradients`), with compensated rounding and with `paged_optax.clip_by_global_norm`. Both clip
gradients. Where a row leaves the length or the number of sequences open, `paged_optax.plan` finds
the largest that fits.

    python benchmarks/big_models.py                        # all rows: an H200, 15 minutes
    python benchmarks/big_models.py --rows 65b/48 24b:paged  # some rows
    python benchmarks/big_models.py --rows tiny            # what a CPU can do
"""

import argparse
import bisect
import dataclasses
import functools
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import llama  # noqa: E402  # pyright: ignore[reportMissingImports]

import paged_optax  # noqa: E402
from paged_optax import Paging, memory_report, paged_adamw8bit, release  # noqa: E402

GIB = 2**30
RANK = 64
WARM_UP = 2  # steps
CUDA_BYTES = 0.75 * GIB  # for CUDA's context, its libraries and their workspace
GRAIN = 128  # lengths that are tried
MOST_TOKENS = 16_384  # in a step
FULL_POOL = 0.98  # of XLA's pool, where it is filled up: it has gaps


@dataclasses.dataclass(frozen=True)
class Row:
    """One training.

    Attributes:
      shape: a name of `llama.SHAPES`.
      method: "qlora" or "full".
      optimizer: "paged" or "adamw".
      card: GiB that everything must fit in; None takes what the GPU has.
      length: tokens of a sequence; None looks for the longest that fits.
      resident: GiB of moments that may be in GPU memory.
      batch: sequences; None looks for the most that fit.
      timed: steps that are timed, after two others.
    """

    shape: str
    method: str
    optimizer: str
    card: float | None
    length: int | None = 2048
    resident: float = 0.0
    batch: int | None = 1
    timed: int = 6

    @property
    def in_place(self) -> bool:
        """Whether the optimizer's call makes the new parameters."""
        return self.method == "full" and self.optimizer == "paged"

    @property
    def name(self) -> str:
        """The model and its card."""
        return self.shape if self.card is None else f"{self.shape}/{self.card:g}"

    @property
    def selectors(self) -> set[str]:
        """What --rows may call it."""
        size = ":batch" * (self.batch is None) or ":length" * (self.length is None)
        names = {self.name, f"{self.name}:{self.optimizer}", f"{self.shape}:{self.method}"}
        return names | ({self.name + size} if size else set())


ROWS = [
    Row("tiny", "qlora", "paged", None, 256),
    Row("tiny", "qlora", "adamw", None, 256),
    Row("tiny", "full", "paged", None, 256),
    Row("tiny", "full", "adamw", None, 256),
    Row("65b", "qlora", "paged", 48, resident=0.6),
    Row("65b", "qlora", "adamw", 48),
    Row("65b", "qlora", "paged", 48),
    Row("33b", "qlora", "paged", 24, 1024),
    Row("33b", "qlora", "adamw", 24, 1024),
    Row("13b", "qlora", "paged", 16, None),
    Row("13b", "qlora", "adamw", 16, None),
    Row("13b", "qlora", "paged", 16, 512, batch=None),
    Row("13b", "qlora", "adamw", 16, 512, batch=None),
    Row("13b", "qlora", "paged", 12, 1024),
    Row("13b", "qlora", "adamw", 12, 1024),
    Row("8b", "full", "paged", 48, 4096, resident=10),
    Row("8b", "full", "adamw", 48, 4096),
    Row("8b", "full", "paged", None, 4096, resident=30),
    Row("8b", "full", "adamw", None, 4096),
    Row("24b", "full", "paged", None, 4096, resident=40),
    Row("24b", "full", "adamw", None, 4096),
    Row("32b", "full", "paged", None, 4096, resident=6, timed=3),
    Row("32b", "full", "adamw", None, 4096),
]


# ----------------------------------------------------------------------- one training, in a child


def make_optimizer(row: Row) -> optax.GradientTransformation:
    adamw, clip = optax.adamw(1e-4, weight_decay=0.01), optax.clip_by_global_norm(1.0)
    if row.optimizer == "paged":
        # Pinned, because moments of many GiB are placed on the host on purpose.
        paging = Paging(device_bytes=int(row.resident * GIB), memory="pinned")
        rounding = "compensated" if row.method == "full" else "nearest"
        paging = paging if jax.default_backend() == "gpu" else None
        adamw = paged_adamw8bit(1e-4, weight_decay=0.01, paging=paging, param_rounding=rounding)
    if row.in_place:
        clip = paged_optax.clip_by_global_norm(1.0)  # without a copy of any gradient
    return optax.chain(clip, adamw)


def make_step(row: Row, tx: optax.GradientTransformation):
    """Returns a jitted step(frozen, trained, opt_state, ids) that takes over what it trains."""
    config = llama.SHAPES[row.shape]

    def loss_fn(trained, frozen, ids):
        base, lora = (frozen, trained) if row.method == "qlora" else (trained, {})
        ones = jnp.ones((ids.shape[0], ids.shape[1] - 1))
        return llama.loss_sum(base, lora, ids, ones, config) / ones.size

    @functools.partial(jax.jit, donate_argnums=(1, 2))
    def step(frozen, trained, opt_state, ids):
        loss, grads = jax.value_and_grad(loss_fn)(trained, frozen, ids)
        if row.in_place:
            # Or XLA computes the loss after the step, from a copy of the old head.
            loss, grads = jax.lax.optimization_barrier((loss, grads))
            return *paged_optax.apply_gradients(tx, grads, opt_state, trained), loss
        updates, opt_state = tx.update(grads, opt_state, trained)
        return optax.apply_updates(trained, updates), opt_state, loss

    return step


def make_weights(row: Row):
    """Returns (frozen, trained)."""
    config = llama.SHAPES[row.shape]
    base = llama.random_base(jax.random.key(0), config, row.method == "qlora")
    lora = llama.init_lora(jax.random.key(1), config, RANK)
    return (base, lora) if row.method == "qlora" else ({}, base)


def pool_bytes(row: Row) -> int:
    """Returns what the planner expects XLA's pool to have in use."""
    planned = paged_optax.plan(
        row.shape,
        card="1TiB",
        host="1TiB",
        rank=RANK if row.method == "qlora" else None,
        batch=row.batch,
        sequence=row.length,
        clip=not row.in_place,
    )
    return (planned.usage if row.optimizer == "paged" else planned.other).pool


def sized(row: Row, count: int) -> Row:
    """Returns the row with what it leaves open set: so many sequences, or pieces of a sequence."""
    if row.batch is None:
        return dataclasses.replace(row, batch=count)
    return dataclasses.replace(row, length=count * GRAIN)


def largest(row: Row, limit: float) -> int:
    """Returns the largest count for `sized` with which the row fits into `limit` bytes, or 1."""
    most = MOST_TOKENS // (row.length or GRAIN)
    counts = range(1, most + 1)
    return max(1, bisect.bisect(counts, limit, key=lambda count: pool_bytes(sized(row, count))))


def watch_pool(samples: list, done: threading.Event) -> None:
    """Appends (time, bytes in use of XLA's pool) until `done`."""
    while not done.wait(0.05):
        stats = jax.local_devices()[0].memory_stats() or {}
        samples.append((time.time(), stats.get("bytes_in_use", 0)))


def say(text: str) -> None:
    """Prints where a row is, for one that is stopped."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def measure(row: Row, tx, step) -> dict:
    """Trains for a few steps; returns what they took."""
    assert row.batch is not None and row.length is not None
    frozen, trained = jax.jit(functools.partial(make_weights, row))()
    jax.block_until_ready(trained)
    say("weights are made")
    state = jax.jit(tx.init)(trained)
    vocab, shape = llama.SHAPES[row.shape].vocab, (row.batch, row.length + 1)
    ids = np.random.default_rng(0).integers(vocab, size=shape, dtype=np.int32)
    losses, start = [], 0.0
    try:
        for i in range(WARM_UP + row.timed):
            trained, state, loss = step(frozen, trained, state, ids)
            losses.append(loss)
            if i < WARM_UP:
                jax.block_until_ready(trained)
                say(f"step {i + 1}, loss {float(loss):.3f}")
                start = time.perf_counter()
        jax.block_until_ready((trained, state, losses))
    except jax.errors.JaxRuntimeError:
        if row.optimizer == "paged" and not losses:
            release(state)  # nobody will use it
        raise
    seconds = (time.perf_counter() - start) / row.timed
    stats = jax.local_devices()[0].memory_stats() or {}
    held = {"resident": 0, "on_host": 0}
    if row.optimizer == "paged":
        report = memory_report(state)
        held = {"resident": report.resident, "on_host": report.on_host}
        release(state)
    return held | {
        "length": row.length,
        "batch": row.batch,
        "seconds": seconds,
        "tokens_per_second": row.batch * row.length / seconds,
        "pool_peak": stats.get("peak_bytes_in_use", 0),
        "process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "losses": list(map(float, losses)),
        "trained": sum(x.size for x in jax.tree.leaves(trained)),
    }


def child(row: Row) -> dict:
    """Runs a row; returns its figures, or under "failure" why there are none."""
    tx = make_optimizer(row)
    stats = jax.local_devices()[0].memory_stats() or {}
    limit = stats.get("bytes_limit", 4 * GIB)
    print(f"pool of {limit / GIB:.2f} GiB", flush=True)
    is_open = row.length is None or row.batch is None
    count = largest(row, FULL_POOL * limit) if is_open else 1
    while True:
        size = sized(row, count) if is_open else row
        try:
            return measure(size, tx, make_step(size, tx))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            message = str(error).splitlines()[0][:160]
            print(f"{size.batch} x {size.length} tokens: {message}", flush=True)
        if count == 1:
            tokens = {"length": size.length, "batch": size.batch}
            return {"failure": "RESOURCE_EXHAUSTED", "message": message} | tokens
        count -= 1


def run_child(row: Row) -> None:
    samples: list = []
    done = threading.Event()
    thread = threading.Thread(target=watch_pool, args=(samples, done), daemon=True)
    jax.local_devices()
    thread.start()
    result = child(row)
    done.set()
    thread.join()
    print(json.dumps(result | {"pool": samples}))  # for the parent, and so the last line


# ----------------------------------------------------------------------- all rows, in the parent


class Gpu:
    """What the driver says of the first GPU that JAX sees; without one all is 0."""

    def __init__(self):
        try:
            import pynvml

            pynvml.nvmlInit()
            index = int(os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0])
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            self.memory = functools.partial(pynvml.nvmlDeviceGetMemoryInfo, handle)
            self.total = int(self.memory().total)
        except Exception:
            self.memory, self.total = None, 0

    def used(self) -> int:
        return int(self.memory().used) if self.memory else 0


def run(row: Row, gpu: Gpu, timeout: float) -> dict:
    """Runs a row in a process of its own; returns its figures and the samples of its memory."""
    # The pool is one piece. One that grows has gaps, and a step asks for half of it at once.
    env = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "true"}
    env.setdefault(
        "JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / "big_models_cache")
    )
    before = gpu.used()
    if gpu.total:
        card = min(gpu.total - before, row.card * GIB if row.card else gpu.total)
        pool = card - CUDA_BYTES - row.resident * GIB
        env["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{pool / gpu.total:.5f}"
    command = [sys.executable, __file__, "--child", json.dumps(dataclasses.asdict(row))]
    start = time.time()
    process = subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    killer = threading.Timer(timeout, process.kill)
    killer.start()
    lines: list[str] = []
    assert process.stdout is not None
    reader = threading.Thread(target=lambda: lines.extend(process.stdout))  # pyright: ignore
    reader.start()
    samples = []
    while process.poll() is None:
        samples.append((time.time() - start, gpu.used() - before))
        time.sleep(0.05)
    reader.join()
    killer.cancel()
    result: dict = {"failure": f"status {process.returncode}"}
    if process.returncode == 0:
        result = json.loads(lines.pop())
        result["pool"] = [(seconds - start, size) for seconds, size in result["pool"]]
    else:
        print("".join(lines[-15:]))
    for line in lines:
        if "tokens:" in line or "pool of" in line:
            print("   ", line.rstrip())
    peak = max(size for _, size in samples)
    return result | {"gpu": samples, "gpu_peak": peak, "wall": time.time() - start, "row": row.name}


COLUMNS = (
    ("optimizer", 16),
    ("tokens", 11),
    ("s/step", 8),
    ("tokens/s", 9),
    ("pool GiB", 9),
    ("moments GiB: GPU", 17),
    ("host", 7),
    ("driver MiB", 11),
    ("process GiB", 12),
)


def header() -> str:
    return f"{'model':<14}" + "".join(f"{name:>{width}}" for name, width in COLUMNS)


def line(row: Row, result: dict) -> str:
    """Describes a row of the table."""
    name = "optax.adamw" if row.optimizer == "adamw" else "paged_adamw8bit"
    tokens = f"{result['batch']} x {result['length']:,}" if "batch" in result else ""
    first = f"{row.name + ' ' + row.method:<14}{name:>16}"
    if "failure" in result:
        return f"{first}{tokens:>11}  {result['failure']}"
    cells = (
        tokens,
        f"{result['seconds']:.3f}",
        f"{result['tokens_per_second']:,.0f}",
        f"{result['pool_peak'] / GIB:.2f}",
        f"{result['resident'] / GIB:.2f}",
        f"{result['on_host'] / GIB:.2f}",
        f"{result['gpu_peak'] / 2**20:,.0f}",
        f"{result['process'] / GIB:.1f}",
    )
    return first + "".join(f"{c:>{w}}" for c, (_, w) in zip(cells, COLUMNS[1:], strict=True))


def has_learned(result: dict) -> bool:
    """Whether the loss fell, as far as there is one."""
    losses = result.get("losses", [1, 0])
    return losses[-1] < losses[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = sorted(set().union(*(row.selectors for row in ROWS)))
    parser.add_argument(
        "--rows", nargs="+", choices=names, metavar="ROW", help=f"of {', '.join(names)}"
    )
    parser.add_argument("--json", type=Path, help="where to save all figures and samples")
    parser.add_argument("--timeout", type=float, default=180, help="seconds for a row")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        run_child(Row(**json.loads(args.child)))
        return 0
    gpu = Gpu()
    results, lines = [], [header()]
    for row in ROWS:
        if not (row.selectors & set(args.rows) if args.rows else row.shape != "tiny"):
            continue
        result = run(row, gpu, args.timeout)
        results.append({**dataclasses.asdict(row), **result})
        lines.append(line(row, result))
        print(f"{lines[-1]}  [{result['wall']:.0f} s]", flush=True)
        if row.card and result["gpu_peak"] > row.card * GIB:
            print(f"    {result['gpu_peak'] / GIB:.2f} GiB are MORE than the card has")
        if not has_learned(result):
            print(f"    the loss did NOT fall: {result['losses']}")
        if args.json:
            args.json.write_text(json.dumps(results))
    print("\n" + "\n".join(lines))
    broken = (r for r in results if "status" in r.get("failure", "") or not has_learned(r))
    return int(any(broken))


if __name__ == "__main__":
    sys.exit(main())
