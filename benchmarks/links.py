"""The rate at which GPUs step moments on the host: each GPU alone, and all of them at once.

    python benchmarks/links.py [--size 536870912] [--repeats 5]

Parameters are bfloat16 and all moments are in pinned host memory. A step reads and writes them over
the GPU's link. GB/s are those of one GPU in one direction, while both directions are busy.

    one program    each GPU has a part of the parameters, as in training
    programs       each GPU has parameters and a program of its own, which are queued in turns
    copies         the copy engines between pinned host memory and each GPU, a thread for each

GPUs that are as fast at once as alone share nothing that limits them.
"""

import argparse
import functools
import statistics
import threading
import time

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from paged_optax import Paging, _ext, apply_gradients, memory_report, paged_adamw8bit, release

GB = 1e9
STEPS = 4  # that are queued at once
ROUNDINGS = {"2.03 bytes a parameter": "nearest", "3.05 bytes, compensated": "compensated"}


class Program:
    """Steps of parameters in equal parts on some devices."""

    def __init__(self, devices: list, size: int, rounding: str):
        kinds = (AxisType.Auto,)
        mesh = jax.make_mesh((len(devices),), ("x",), axis_types=kinds, devices=devices)
        shape, cut = (len(devices) * size,), NamedSharding(mesh, P("x"))
        paging = Paging(device_bytes=0, memory="pinned")
        tx = paged_adamw8bit(1e-5, param_rounding=rounding, paging=paging)
        make = functools.partial(jax.random.normal, shape=shape, dtype=jnp.bfloat16)
        self.grads = jax.jit(make, out_shardings=cut)(jax.random.key(0))
        self.params = jax.jit(jnp.ones_like, out_shardings=cut)(self.grads)
        self.state = jax.jit(tx.init)(self.params)
        self.update = jax.jit(functools.partial(apply_gradients, tx), donate_argnums=(1, 2))

    def step(self) -> None:
        self.params, self.state = self.update(self.grads, self.state, self.params)


def seconds_of_a_step(programs: list[Program], repeats: int) -> float:
    """The median of several rounds, after one that does not count."""
    times = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        for _ in range(STEPS):
            for program in programs:
                program.step()
        jax.block_until_ready([(program.params, program.state) for program in programs])
        times.append((time.perf_counter() - start) / STEPS)
    return statistics.median(times[1:])


def rate_of_steps(groups: list[list], rounding: str, args) -> float:
    """Bytes per second of one GPU; each group of devices has a program of its own."""
    programs = [Program(devices, args.size, rounding) for devices in groups]
    seconds = seconds_of_a_step(programs, args.repeats)
    on_host = memory_report(programs[0].state).devices[0].on_host
    for program in programs:
        release(program.state)
    return on_host / seconds


def rate_of_copies(devices: list) -> float:
    """Bytes per second of the slowest link, each way."""
    rates: list[float] = []

    def copy(ordinal: int) -> None:
        rates.append(_ext.measure_link(ordinal, 2**30)[2])

    threads = [threading.Thread(target=copy, args=(device.id,)) for device in devices]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return min(rates)


def show(label: str, name: str, rate: float) -> None:
    print(f"{label:<14}{name:<28}{rate / GB:>8.1f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", type=int, default=2**29, help="parameters of each GPU")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    devices = jax.local_devices()
    alone = [(f"GPU {device.id}", [device]) for device in devices]
    print(f"{'':<14}{'':<28}{'GB/s':>8}")
    for name, rounding in ROUNDINGS.items():
        for label, some in alone:
            show(label, name, rate_of_steps([some], rounding, args))
        show("one program", name, rate_of_steps([devices], rounding, args))
        each = [[device] for device in devices]
        show("programs", name, rate_of_steps(each, rounding, args))
    if jax.default_backend() == "gpu":
        for label, some in [*alone, ("all", devices)]:
            show(label, "copies", rate_of_copies(some))


if __name__ == "__main__":
    main()
