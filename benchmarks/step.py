"""Times whole AdamW steps: gradients given, everything donated, against the peers installed.

    python benchmarks/step.py [--cases float32 lora ...] [--peers optax paged ...] [--ways loop]
                              [--steps 100] [--processor-time]
    python benchmarks/step.py --clip
    python benchmarks/step.py --sizes times.json
    python benchmarks/step.py --plot times.json docs/step_time.png

A step takes gradients, state and parameters and makes the new parameters. "loop" is a step of a
program that takes 20 of them, or --steps; the more there are, the less of the program's own start
is in the time. "dispatched" is one of ten programs that are started one after the other. Every
optimizer's first step is compared with what AdamW's first step is before it is timed. "of copy" is
the memory rate of the loop as a share of a copy's. --clip times steps of gradients that are clipped
by their global norm. --processor-time adds up what all threads of this process have worked, for a
CPU that other programs use too. --sizes times steps of one tensor of 1e4 to 1e9 float32 parameters
(to 1e8 on a CPU) in a loop, and --plot draws these times.
"""

import argparse
import gc
import json
import re
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from peers import DECAY, RATE, Peer, clipping_peers, peers

WAYS = ["loop", "dispatched"]
DISPATCHED = 10  # queued in a row and timed together
LOOP = 20  # steps of a program that loops


def llama_1b() -> list[tuple[int, ...]]:
    """Shapes of the 146 leaves of Llama-3.2-1B."""
    layer = [(2048, 2048), (2048, 512), (2048, 512), (2048, 2048)]
    layer += [(2048, 8192), (2048, 8192), (8192, 2048), (2048,), (2048,)]
    return [(128256, 2048), *layer * 16, (2048,)]


def cases() -> dict[str, tuple[str, list[tuple[int, ...]], str]]:
    """By their names on the command line: a title, shapes, and a dtype."""
    on_gpu = jax.default_backend() == "gpu"
    size = 2**28 if on_gpu else 10_000_000
    one = f"1 x {size / 1e6:.0f}M"
    found = {
        "float32": (f"{one} float32", [(size,)], "float32"),
        "bfloat16": (f"{one} bfloat16", [(size,)], "bfloat16"),
        "lora": ("1120 x 4096x16 float32", [(4096, 16)] * 1120, "float32"),
        "small": ("1120 x 16 float32", [(16,)] * 1120, "float32"),
    }
    if on_gpu:
        found["llama32"] = ("Llama 1B float32", llama_1b(), "float32")
        found["llama16"] = ("Llama 1B bfloat16", llama_1b(), "bfloat16")
    return found


def make_leaves(shapes: list[tuple[int, ...]], dtype: Any, seed: int) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    normal = jax.jit(jax.random.normal, static_argnums=(1, 2))
    return [normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


def check_first_step(run: Any, params: np.ndarray, grads: np.ndarray, dtype: Any) -> None:
    """Adam's first step has the size of the learning rate."""
    run.take(1)
    run.wait()
    expected = params - RATE * (grads / (np.abs(grads) + 1e-8) + DECAY * params)
    digit = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(run.sample(), expected, rtol=2 * digit, atol=2e-2 * RATE)


def time_ms(
    function: Any,
    wait: Any,
    num_steps: int,
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """The median of the milliseconds of a step."""
    times = []
    for _ in range(repeats + 1):  # the first one compiles
        wait()
        start = clock()
        function()
        wait()
        times.append((clock() - start) / num_steps)
    return 1e3 * statistics.median(times[1:])


def time_peer(
    peer: Peer,
    shapes: list[tuple[int, ...]],
    dtype: Any,
    repeats: int,
    ways: list[str],
    num_steps: int = LOOP,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float | None]:
    """Milliseconds of a step in a loop, and of one that is dispatched, as far as asked for."""
    params, grads = (make_leaves(shapes, dtype, seed) for seed in (0, 1))
    samples = [np.asarray(leaves[0].ravel()[:64], np.float32) for leaves in (params, grads)]
    run = peer.start(params, grads)
    check_first_step(run, samples[0], samples[1], dtype)
    times: list[float | None] = [None, None]
    if "loop" in ways and run.can_loop:
        times[0] = time_ms(lambda: run.loop(num_steps), run.wait, num_steps, repeats, clock)
    if "dispatched" in ways:
        times[1] = time_ms(lambda: run.take(DISPATCHED), run.wait, DISPATCHED, repeats, clock)
    run.close()
    return times


def copy_rate(num_bytes: int, repeats: int) -> float:
    """Bytes a second, read and written, of a copy on the device."""

    @jax.jit
    def copies(x):
        return jax.lax.fori_loop(0, LOOP, lambda _, x: x + 1, x)

    x = jnp.ones(num_bytes // 4, jnp.float32)
    ms = time_ms(lambda: copies(x).block_until_ready(), lambda: None, LOOP, repeats)
    return 2 * num_bytes / (1e-3 * ms)


def print_table(args: argparse.Namespace) -> None:
    rate = copy_rate(2**30 if jax.default_backend() == "gpu" else 2**26, args.repeats)
    print(f"{jax.devices()[0].device_kind}, copy {rate / 1e9:.0f} GB/s (read and written)")
    clock = time.process_time if args.processor_time else time.perf_counter
    for name in args.cases or cases():
        title, shapes, dtype = cases()[name]
        size = sum(int(np.prod(shape)) for shape in shapes)
        print(f"\n{f'{title}, ms a step':<38}{'loop':>12}{'dispatched':>12}{'of copy':>10}")
        for peer in clipping_peers(args.codec) if args.clip else peers(dtype, args.codec):
            if not any(re.search(pattern, peer.name) for pattern in args.peers):
                continue
            times = time_peer(peer, shapes, dtype, args.repeats, args.ways, args.steps, clock)
            gc.collect()  # the memory of what the peer leaves behind
            cells = [f"{ms:.2f}" if ms else "-" for ms in times]
            share = "-"
            if peer.nbytes and times[0] and not args.processor_time:
                nbytes = size * peer.nbytes(jnp.dtype(dtype).itemsize)
                share = f"{nbytes / (1e-3 * times[0]) / rate:.0%}"
            print(f"{peer.name:<38}{cells[0]:>12}{cells[1]:>12}{share:>10}", flush=True)


def time_sizes(path: str, codec: str, repeats: int) -> None:
    """Writes and prints the times of steps of one tensor."""
    largest = 9 if jax.default_backend() == "gpu" else 8
    sizes = [int(x) for e in range(4, largest) for x in (10**e, 3 * 10**e)] + [10**largest]
    rows = peers("float32", codec)[:3]
    found: dict[str, Any] = {"device": jax.devices()[0].device_kind, "sizes": sizes, "ms": {}}
    for peer in rows:
        times = [time_peer(peer, [(size,)], "float32", repeats, ["loop"])[0] for size in sizes]
        found["ms"][peer.name] = times
        with open(path, "w") as file:
            json.dump(found, file)
    print(f"{'float32 parameters, ms':<28}" + "".join(f"{size:>10.0e}" for size in sizes))
    for name, times in found["ms"].items():
        print(f"{name:<28}" + "".join(f"{ms:>10.3f}" for ms in times))


def plot(path: str, picture: str) -> None:
    import matplotlib.pyplot as plt

    with open(path) as file:
        found = json.load(file)
    figure, axes = plt.subplots(figsize=(7, 4))
    for name, times in found["ms"].items():
        axes.loglog(found["sizes"], times, marker="o", markersize=3, label=name)
    axes.set(xlabel="float32 parameters of one tensor", ylabel="ms a step, in a loop")
    axes.set_title(found["device"])
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(picture, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=None)
    codecs = ["dynamic", "ratio", "ratio6", "ratio4"]
    parser.add_argument("--codec", choices=codecs, default="ratio")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--steps", type=int, default=LOOP, help="of a program that loops")
    parser.add_argument("--peers", nargs="+", default=[""], help="patterns of their names")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--clip", action="store_true", help="gradients are clipped")
    parser.add_argument("--processor-time", action="store_true", help="instead of elapsed time")
    parser.add_argument("--sizes", metavar="FILE")
    parser.add_argument("--plot", nargs=2, metavar=("FILE", "PICTURE"))
    args = parser.parse_args()
    if args.plot:
        plot(*args.plot)
    elif args.sizes:
        time_sizes(args.sizes, args.codec, args.repeats)
    else:
        print_table(args)


if __name__ == "__main__":
    main()
