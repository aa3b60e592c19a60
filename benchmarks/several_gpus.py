"""Full fine-tuning of a Llama shape on 1, 2, ... GPUs: parameters, gradients, moments in shards.

    python benchmarks/several_gpus.py [--shape 8b] [--gpus 1 2] [--optimizer resident host adamw]
    python benchmarks/several_gpus.py --processes      # one process a GPU (jax.distributed, NCCL)

Every GPU keeps an equal part of each bfloat16 parameter, of its gradient, and of its moments, and
works on an equal part of the batch. A layer gathers its weights while it runs (FSDP). All rows
train on the same data, with the same number of tokens a step. Every row is a process of its own, so
that its memory is its own as well.

"step" is a whole training step, queued without waiting. "update" is the optimizer's step alone,
with the application of its updates; the host waits before and after it. "link" is the rate at which
one GPU moves its moments on the host, each way, while all GPUs do the same.

    resident    paged_adamw8bit, compensated, moments in GPU memory
    half, host  the same with half of the moments, or all of them, in pinned host memory
    adamw       optax.adamw; its moments are bfloat16 like the parameters
"""

import argparse
import dataclasses
import functools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from paged_optax import Paging, Quantization, memory_report, paged_adamw8bit, release

AXIS = "fsdp"
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a Llama model."""

    layers: int
    dim: int
    hidden: int
    heads: int
    kv_heads: int
    vocab: int


SHAPES = {
    "tiny": Shape(2, 256, 512, 4, 2, 512),
    "1b": Shape(16, 2048, 8192, 32, 8, 128_256),
    "8b": Shape(32, 4096, 14_336, 32, 8, 128_256),
}


# ---------------------------------------------------------------------------------------- the model


def parameter_shapes(s: Shape) -> dict:
    """Returns the shapes of all parameters. Those of the layers are stacked."""
    kv = s.dim // s.heads * s.kv_heads
    layer = {
        "attention_norm": (s.dim,),
        "q": (s.dim, s.dim),
        "k": (s.dim, kv),
        "v": (s.dim, kv),
        "o": (s.dim, s.dim),
        "mlp_norm": (s.dim,),
        "gate": (s.dim, s.hidden),
        "up": (s.dim, s.hidden),
        "down": (s.hidden, s.dim),
    }
    return {
        "embed": (s.vocab, s.dim),
        "layers": {name: (s.layers, *shape) for name, shape in layer.items()},
        "norm": (s.dim,),
        "head": (s.dim, s.vocab),
    }


def specs_of(shapes: dict) -> dict:
    """Cuts every parameter along its first dimension; those of the layers along their second."""
    cut = functools.partial(jax.tree.map, is_leaf=lambda x: isinstance(x, tuple))
    return cut(lambda _: P(AXIS), shapes) | {
        "layers": cut(lambda _: P(None, AXIS), shapes["layers"])
    }


def init(shapes: dict, seed: int) -> dict:
    """Returns bfloat16 parameters: ones for norms, else normal numbers."""
    leaves, treedef = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(treedef.unflatten(leaves))]
    del paths
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    norms = jax.tree.leaves(
        {
            "embed": 0,
            "layers": {k: k.endswith("norm") for k in shapes["layers"]},
            "norm": 1,
            "head": 0,
        }
    )
    made = [
        jnp.ones(shape, jnp.bfloat16)
        if norm
        else jax.random.normal(key, shape, jnp.bfloat16) * 0.02
        for key, shape, norm in zip(keys, leaves, norms, strict=True)
    ]
    return treedef.unflatten(made)


def normed(x, scale):
    wide = x.astype(jnp.float32)
    wide *= jax.lax.rsqrt(jnp.mean(wide**2, -1, keepdims=True) + 1e-5)
    return wide.astype(x.dtype) * scale


def rope(x):
    """Rotates the halves of every head of `x` (batch, time, heads, head_dim) by position."""
    time_steps, head_dim = x.shape[1], x.shape[-1]
    frequency = 500_000.0 ** (-jnp.arange(0, head_dim, 2) / head_dim)
    angle = jnp.arange(time_steps)[:, None, None] * frequency
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


def layer(s: Shape, attention: str, x, w):
    """One Llama layer on `x` (batch, time, dim) with whole weights `w`."""
    y = normed(x, w["attention_norm"])
    q, k, v = ((y @ w[name]).reshape(*y.shape[:2], -1, s.dim // s.heads) for name in "qkv")
    mixed = jax.nn.dot_product_attention(
        rope(q), rope(k), v, is_causal=True, implementation=attention
    )
    x = x + mixed.reshape(x.shape) @ w["o"]
    y = normed(x, w["mlp_norm"])
    return x + (jax.nn.silu(y @ w["gate"]) * (y @ w["up"])) @ w["down"]


def gather(shards):
    """Returns whole arrays. Their gradients are summed over the GPUs and come back as shards."""
    return jax.tree.map(lambda x: jax.lax.all_gather(x, AXIS, axis=0, tiled=True), shards)


def local_loss(s: Shape, attention: str, params, ids):
    """The mean next-token loss over all devices; this one has the sequences `ids`."""

    @jax.checkpoint  # the backward pass gathers and computes again
    def run_layer(x, shards):
        return layer(s, attention, x, gather(shards)), None

    @jax.checkpoint
    def sequence_loss(x, labels, head):
        logits = (x @ head).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    x = gather(params["embed"])[ids[:, :-1]]
    x, _ = jax.lax.scan(run_layer, x, params["layers"])
    x, head = normed(x, gather(params["norm"])), gather(params["head"])
    losses = jax.lax.map(lambda row: sequence_loss(*row, head), (x, ids[:, 1:]))
    return jax.lax.pmean(losses.mean(), AXIS)


# -------------------------------------------------------------------------------------- one row


def batches(args, mesh):
    """Yields the same batches (batch, seq_len + 1) of Python's documentation to any mesh."""
    text = np.frombuffer("".join(topics.values()).encode(), np.uint8).astype(np.int32)
    rng = np.random.default_rng(0)
    sharding = NamedSharding(mesh, P(AXIS))
    while True:
        starts = rng.integers(len(text) - args.seq_len - 1, size=args.batch)
        ids = text[starts[:, None] + np.arange(args.seq_len + 1)]
        yield jax.make_array_from_callback(ids.shape, sharding, ids.__getitem__)


def make_tx(args, moment_bytes):
    """The optimizer of a row; `moment_bytes` are those of one GPU."""
    if args.optimizer[0] == "adamw":
        return optax.adamw(args.lr)
    paging = {
        "resident": Paging(),
        "half": Paging(device_bytes=moment_bytes // 2, memory="pinned"),
        "host": Paging(device_bytes=0, memory="pinned"),
    }[args.optimizer[0]]
    quantization = Quantization(args.codec, seed=args.seed)
    return paged_adamw8bit(
        args.lr, param_rounding="compensated", quantization=quantization, paging=paging
    )


def measure(args, mesh) -> dict:
    """Trains; returns losses, times in seconds, bytes by GPU."""
    shape = SHAPES[args.shape]
    shapes = parameter_shapes(shape)
    specs = specs_of(shapes)
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    params = jax.jit(functools.partial(init, shapes, 0), out_shardings=shardings)()
    size = sum(x.size for x in jax.tree.leaves(params))
    tx = make_tx(args, size // mesh.size * (3 * 256 + 8) // 256)
    state = jax.jit(tx.init)(params)

    loss_fn = functools.partial(local_loss, shape, args.attention)
    loss_fn = jax.shard_map(loss_fn, in_specs=(specs, P(AXIS)), out_specs=P())
    grad = jax.jit(jax.value_and_grad(loss_fn))

    paged = args.optimizer[0] != "adamw"

    # The paged update writes into the buffers of the gradients, so these are donated, and the
    # updates are a result to take their place. Those of optax.adamw are never in memory.
    @functools.partial(jax.jit, donate_argnums=(0, 1, 2) if paged else (0, 1))
    def update(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, updates if paged else None

    data = batches(args, mesh)
    ids = next(data)
    grad = grad.lower(params, ids).compile()
    loss, grads = grad(params, ids)
    update = update.lower(params, state, grads).compile()
    program = update.as_text()
    found = [name for name in COLLECTIVES if name in program]
    if found and paged:
        raise SystemExit(f"the update has collectives: {found}")
    params, state, grads = update(params, state, grads)
    del grads
    losses = [loss]
    updates, alone = [], []
    for _ in range(args.steps):  # the two parts one by one
        ids = next(data)
        jax.block_until_ready(params)
        times = [time.perf_counter()]
        loss, grads = jax.block_until_ready(grad(params, ids))
        times.append(time.perf_counter())
        params, state, grads = jax.block_until_ready(update(params, state, grads))
        del grads
        times.append(time.perf_counter())
        losses.append(loss)
        alone.append(times[1] - times[0])
        updates.append(times[2] - times[1])
    ids = [next(data) for _ in range(args.steps)]
    jax.block_until_ready(ids)
    start = time.perf_counter()
    for batch in ids:
        loss, grads = grad(params, batch)
        params, state, grads = update(params, state, grads)
        losses.append(loss)
        del grads
    jax.block_until_ready((params, state))
    step = (time.perf_counter() - start) / len(ids)
    row = {
        "params": size,
        "collectives": found,
        "losses": [float(loss) for loss in losses],
        "grad": statistics.median(alone),
        "update": statistics.median(updates),
        "step": step,
        "tokens": args.batch * args.seq_len / step,
        "xla": [(d.memory_stats() or {}).get("peak_bytes_in_use", 0) for d in mesh.local_devices],
        "resident": [0] * len(mesh.local_devices),
        "on_host": [0] * len(mesh.local_devices),
    }
    if paged:
        report = memory_report(state)
        row["resident"] = [device.resident for device in report.devices]
        row["on_host"] = [device.on_host for device in report.devices]
        row["elsewhere"] = report.elsewhere
        release(state)
    return row


def child(args) -> None:
    """Measures one row, as one of `--processes`."""
    num_gpus = args.gpus[0]
    if args.rank is not None:
        jax.distributed.initialize(
            f"localhost:{args.port}", num_gpus, args.rank, local_device_ids=[args.rank]
        )
    mesh = jax.make_mesh(
        (num_gpus,), (AXIS,), axis_types=(AxisType.Explicit,), devices=jax.devices()[:num_gpus]
    )
    with jax.set_mesh(mesh):
        print(json.dumps(measure(args, mesh)), flush=True)


# ------------------------------------------------------------------------------------ the table


def run(args, num_gpus: int, optimizer: str, cache: str, extra=()) -> dict | None:
    """Runs one row in new processes; returns its figures, or None if it failed."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, __file__, "--child", "--gpus", str(num_gpus), "--port", str(port)]
    command += ["--optimizer", optimizer, *extra]
    for name in ("shape", "batch", "seq_len", "steps", "lr", "codec", "attention", "seed"):
        command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    environment = {
        **os.environ,
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1",
    }
    ranks = [["--rank", str(i)] for i in range(num_gpus)] if args.processes else [[]]
    processes = [
        subprocess.Popen([*command, *rank], env=environment, stdout=subprocess.PIPE, text=True)
        for rank in ranks
    ]
    rows = []
    for process in processes:
        text, _ = process.communicate()
        rows += [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    if len(rows) != len(processes):
        return None
    for name in ("xla", "resident", "on_host"):
        rows[0][name] = [x for row in rows for x in row[name]]
    return rows[0]


def spread(values) -> str:
    """One number in GiB, or two if the GPUs differ."""
    texts = [f"{value / GIB:.1f}" for value in values]
    return texts[0] if len(set(texts)) == 1 else f"{min(texts)}-{max(texts)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2, 4])
    optimizers = ["resident", "half", "host", "adamw"]
    parser.add_argument("--optimizer", nargs="+", choices=optimizers, default=optimizers)
    parser.add_argument("--processes", action="store_true", help="one process a GPU")
    parser.add_argument("--batch", type=int, default=8, help="sequences a step, on all GPUs")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--codec", choices=["ratio", "dynamic"], default="ratio")
    parser.add_argument("--seed", type=int, default=0, help="of the random bits")
    parser.add_argument("--attention", choices=["cudnn", "xla"], default="cudnn")
    for name in ("--rank", "--port"):
        parser.add_argument(name, type=int, help=argparse.SUPPRESS)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args)
        return
    header = ("tokens/s", "step, ms", "update, ms", "XLA, GiB", "moments", "on host", "link, GB/s")
    print(f"{'GPUs':<6}{'optimizer':<12}" + "".join(f"{h:>12}" for h in header) + "  losses")
    with tempfile.TemporaryDirectory() as cache:
        for num_gpus in args.gpus:
            for optimizer in args.optimizer:
                row = run(args, num_gpus, optimizer, cache)
                if row is None:
                    print(f"{num_gpus:<6}{optimizer:<12} failed", flush=True)
                    continue
                rate = max(row["on_host"]) / row["update"] / 1e9
                columns = (
                    f"{row['tokens']:,.0f}",
                    f"{1e3 * row['step']:,.0f}",
                    f"{1e3 * row['update']:,.1f}",
                    spread(row["xla"]),
                    spread(row["resident"]),
                    spread(row["on_host"]),
                    f"{rate:.1f}" if rate else "",
                )
                losses = " ".join(f"{loss:.4f}" for loss in row["losses"])
                cells = "".join(f"{c:>12}" for c in columns)
                print(f"{num_gpus:<6}{optimizer:<12}{cells}  {losses}", flush=True)


if __name__ == "__main__":
    main()
