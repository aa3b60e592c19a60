"""Times a step with moments in GPU memory, in host memory, and in both, next to alternatives.

    python benchmarks/paging.py [--size N] [--repeats N]

There is one tensor of float32 gradients. Only updates are timed, without decay and apply, and with
everything donated, so that only gradients, updates and moments move. "Link" is the rate that the
copy engines reach between pinned host memory and the GPU in the same run, each way while both are
busy. A step reads and writes moments on the host over this link, in place.

The alternatives are `optax.scale_by_adam` with its state in JAX's pinned_host memory and, where
torch and bitsandbytes are installed, PagedAdamW8bit. Touching its state on the host evicts it.
"""

import argparse
import importlib.util
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import SingleDeviceSharding

from paged_optax import Paging, _ext, memory_report, moments, release, scale_by_paged_adam8bit

GB = 1e9


def median_time(step, carry, repeats):
    """Returns the seconds of a step on `carry`, and the last carry. First steps do not count."""
    for _ in range(3):
        carry = step(*carry)
    jax.block_until_ready(carry)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(5):
            carry = step(*carry)
        jax.block_until_ready(carry)
        times.append((time.perf_counter() - start) / 5)
    return statistics.median(times), carry


def paged(size, share, memory, repeats):
    """Returns the seconds of a step, and the report, with this share of the moments resident."""
    total = -(-size // 256) * 520
    device_bytes = None if share == 1 else int(share * total)
    tx = scale_by_paged_adam8bit(paging=Paging(device_bytes=device_bytes, memory=memory))

    def step(grads, state):
        return tx.update(grads, state)

    grads = jnp.linspace(-1, 1, size, dtype=jnp.float32)
    state = tx.init(grads)
    seconds, (_, state) = median_time(jax.jit(step, donate_argnums=(0, 1)), (grads, state), repeats)
    report = memory_report(state)
    release(state)
    return seconds, report


def check(size):
    """Checks that placement changes no bit of updates and moments after a few steps."""
    results = []
    for paging in (
        Paging(),
        Paging(device_bytes=0),
        Paging(device_bytes=size),
        Paging(memory="pinned"),
    ):
        tx = scale_by_paged_adam8bit(paging=paging)
        grads = jnp.linspace(-1, 1, size, dtype=jnp.float32)
        updates, state = grads, tx.init(grads)
        for _ in range(3):
            updates, state = jax.jit(tx.update)(updates, state)
        results.append((np.asarray(updates), moments(state).mu, moments(state).nu))
        release(state)
    for result in results[1:]:
        for a, b in zip(results[0], result, strict=True):
            np.testing.assert_array_equal(a, b)


def pinned_host_adam(size, repeats):
    """Times float32 Adam whose state lives in JAX's pinned_host memory between steps."""
    device = jax.devices("gpu")[0]
    there = SingleDeviceSharding(device)
    host = SingleDeviceSharding(device, memory_kind="pinned_host")
    tx = optax.scale_by_adam()
    grads = jnp.linspace(-1, 1, size, dtype=jnp.float32)

    def step(grads, state):
        updates, state = tx.update(grads, jax.device_put(state, there))
        return updates, jax.device_put(state, host)

    state = jax.device_put(tx.init(grads), host)
    step = jax.jit(step, donate_argnums=(0, 1), out_shardings=(there, host))
    return median_time(step, (grads, state), repeats)[0]


def resident_adam(size, repeats):
    tx = optax.scale_by_adam()
    grads = jnp.linspace(-1, 1, size, dtype=jnp.float32)
    step = jax.jit(tx.update, donate_argnums=(0, 1))
    return median_time(step, (grads, tx.init(grads)), repeats)[0]


def bitsandbytes_evicted(size, repeats):
    import bitsandbytes  # pyright: ignore[reportMissingImports]
    import torch  # pyright: ignore[reportMissingImports]

    param = torch.zeros(size, device="cuda", requires_grad=True)
    param.grad = torch.linspace(-1, 1, size, device="cuda")
    optimizer = bitsandbytes.optim.PagedAdamW8bit([param])
    times, resident = [], []
    optimizer.step()
    for _ in range(max(3, repeats // 4)):
        torch.cuda.synchronize()
        start = time.perf_counter()
        optimizer.step()
        torch.cuda.synchronize()
        resident.append(time.perf_counter() - start)
        for key in ("state1", "state2"):
            optimizer.state[param][key].numpy().max()  # read by the CPU: the pages move there
        torch.cuda.synchronize()
        start = time.perf_counter()
        optimizer.step()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(resident), statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", type=int, default=2**28, help="elements of the tensor")
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    if jax.default_backend() != "gpu":
        parser.exit(1, "this needs an NVIDIA GPU: on a CPU, moments have only one place\n")

    check(2**22)
    rates = _ext.measure_link(0, 2**29)
    print(f"{jax.devices()[0].device_kind}, {args.size / 1e6:.0f}M float32")
    print(
        f"link, GB/s: in {rates[0] / GB:.1f}, out {rates[1] / GB:.1f},"
        f" each way at once {rates[2] / GB:.1f}\n"
    )
    header = ("ms", "resident", "on host, MiB", "GB/s each way", "of link")
    print(f"{'step':<36}" + "".join(f"{h:>15}" for h in header))

    def row(name, seconds, resident="", host=0):
        rate = host / seconds
        columns = (
            f"{1e3 * seconds:.2f}",
            resident,
            f"{host / 2**20:.0f}" if host else "",
            f"{rate / GB:.1f}" if host else "",
            f"{rate / rates[2]:.2f}" if host else "",
        )
        print(f"{name:<36}" + "".join(f"{c:>15}" for c in columns))

    for memory in ("managed", "pinned"):
        for share in (1, 0.75, 0.5, 0.25, 0) if memory == "managed" else (1, 0.5, 0):
            seconds, report = paged(args.size, share, memory, args.repeats)
            shown = f"{100 * report.resident / report.total:.0f} %"
            row(f"paged, {memory} memory", seconds, shown, report.on_host)
    row("optax.scale_by_adam, float32", resident_adam(args.size, args.repeats), "100 %")
    seconds = pinned_host_adam(args.size, max(3, args.repeats // 3))
    row("optax.scale_by_adam in pinned_host", seconds, "0 %", 8 * args.size)
    if importlib.util.find_spec("torch") and importlib.util.find_spec("bitsandbytes"):
        resident, evicted = bitsandbytes_evicted(args.size, args.repeats)
        row("bitsandbytes PagedAdamW8bit", resident, "100 %")
        row("bitsandbytes, after eviction", evicted, "0 %", 2 * args.size)
    else:
        print("bitsandbytes: not installed")


if __name__ == "__main__":
    main()
