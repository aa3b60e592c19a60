"""Measures how much GPU memory XLA's pool leaves for moments, with its default size and others.

    python benchmarks/beside_xla.py [--size N]

Each row is a process of its own. It takes a few steps with one tensor of float32 gradients, under
the XLA setting that the row names. The headroom is chosen such that half of the moments have room
next to the default pool (75 % of the card). So the benchmark works on a large card as on a small
one, and need not fill it. The last row starts with a small pool; then XLA takes memory until it has
75 % too.
"""

import argparse
import json
import os
import subprocess
import sys
import time

MIB = 2**20
SETTINGS = {
    "default": {},
    "XLA_PYTHON_CLIENT_MEM_FRACTION=.5": {"XLA_PYTHON_CLIENT_MEM_FRACTION": ".5"},
    "XLA_PYTHON_CLIENT_PREALLOCATE=false": {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
}


def child(size: int, headroom: int, grow_to: int) -> None:
    """Takes steps and prints the measurements."""
    import warnings

    import jax
    import jax.numpy as jnp

    from paged_optax import Paging, memory_report, release, scale_by_paged_adam8bit

    tx = scale_by_paged_adam8bit(paging=Paging(headroom_bytes=headroom))
    grads = jnp.linspace(-1, 1, size, dtype=jnp.float32)
    state = tx.init(grads)
    step = jax.jit(tx.update, donate_argnums=(0, 1))

    def steps(count):
        nonlocal grads, state
        for _ in range(count):
            grads, state = step(grads, state)
        jax.block_until_ready(grads)

    def show(**more):
        steps(100)  # by then, moments that have to move have moved
        start = time.perf_counter()
        steps(20)
        ms = (time.perf_counter() - start) / 20 * 1e3
        (device,) = memory_report(state).devices
        row = {key: getattr(device, key) for key in ("total", "resident", "free", "pool", "moved")}
        print(json.dumps(row | {"ms": ms, "warned": len(warned)} | more), flush=True)

    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        steps(3)
        show()
        (device,) = memory_report(state).devices
        if grow_to:
            taken = jnp.zeros(max(0, grow_to - (device.pool or 0)), jnp.uint8)
            taken.block_until_ready()
            show(grown=True)
            del taken
    release(state)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", type=int, default=2**28, help="elements of the tensor")
    parser.add_argument("--child", type=int, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.size, *args.child)
        return

    def run(setting, headroom, grow_to=0):
        command = [sys.executable, __file__, "--size", str(args.size)]
        process = subprocess.run(
            [*command, "--child", str(headroom), str(grow_to)],
            env=os.environ | SETTINGS[setting],
            stdout=subprocess.PIPE,
            text=True,
        )
        if process.returncode:
            sys.exit("there are no figures because the steps failed (this needs an NVIDIA GPU)")
        return [json.loads(line) for line in process.stdout.splitlines() if line[:1] == "{"]

    (row,) = run("default", 0)  # how much the default pool leaves
    left = row["free"] + row["resident"]
    headroom = left - row["total"] // 2
    if headroom < 0:
        sys.exit(f"XLA's default pool leaves {left} bytes, too few; take a smaller --size")
    print(f"{row['total'] / MIB:.0f} MiB of moments, headroom {headroom / MIB:.0f} MiB\n")
    header = ("pool, MiB", "free, MiB", "resident", "ms", "warned")
    print(f"{'setting':<40}" + "".join(f"{h:>12}" for h in header))
    rows = [(name, run(name, headroom)[0]) for name in SETTINGS]
    grown = run("XLA_PYTHON_CLIENT_PREALLOCATE=false", headroom, grow_to=row["pool"])
    rows.append(("... after XLA's pool has grown", grown[-1]))
    for name, row in rows:
        columns = (
            f"{row['pool'] / MIB:,.0f}",
            f"{row['free'] / MIB:,.0f}",
            f"{100 * row['resident'] / row['total']:.0f} %",
            f"{row['ms']:.2f}",
            "yes" if row["warned"] else "no",
        )
        print(f"{name:<40}" + "".join(f"{c:>12}" for c in columns))


if __name__ == "__main__":
    main()
