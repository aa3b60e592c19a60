"""Where the moments are: `memory_report` and its tables."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from . import _ext, _names
from ._bytes import format_bytes
from ._log import named
from ._pool import advise, xla_pool
from ._refused import tell_refusals
from ._state import find_states, read_token
from ._transfer import find_staged

MAX_ROWS = 12  # groups of leaves that a printed report lists


@dataclasses.dataclass(frozen=True)
class DeviceMemory:
    """Moments on one device. Sizes are in bytes.

    Attributes:
      device: platform and number, such as ``cuda:0``.
      total: all of the moments.
      resident: those in the device's own memory; of a file on the CPU, those in RAM.
      replay: those of the second copy that ``replay=True`` keeps; part of the total.
      memory: ``managed`` or ``pinned`` on a GPU, ``host`` or ``file`` on the CPU; several kinds are
        joined by ``+``.
      budget: the smallest ``Paging(device_bytes=...)`` of the states; None without one.
      moved: bytes moved between device and host since the states were made.
      moving_seconds: seconds that these moves took while training went on.
      free: free memory of the GPU; None on the CPU.
      pool: what XLA's allocator holds of the GPU; None where that is not known.
      pool_in_use: the most of the pool that was in use at one time.
      evicted: whether `evict` keeps moments out of the device.
      trouble: what is wrong with the memory although the moments are whole, such as a disk that
        took no writes; empty if nothing is.
    """

    device: str
    total: int
    resident: int
    replay: int = 0
    memory: str = "host"
    budget: int | None = None
    moved: int = 0
    moving_seconds: float = 0.0
    free: int | None = None
    pool: int | None = None
    pool_in_use: int | None = None
    evicted: bool = False
    trouble: str = ""

    @property
    def on_host(self) -> int:
        """Bytes that are not resident: in host memory that a GPU reaches over its link, or on
        disk."""
        return self.total - self.resident

    @property
    def advice(self) -> str:
        """How to get more moments into the GPU's memory, if only XLA's pool keeps them out."""
        if self.budget is not None or self.evicted or self.pool is None:
            return ""
        if self.pool_in_use is None or self.free is None or self.free > self.on_host:
            return ""
        return advise(self.on_host, self.pool, self.pool_in_use)


@dataclasses.dataclass(frozen=True)
class LeafGroup:
    """Moments of the leaves below one branch of the parameters' tree, on the process's devices.

    Attributes:
      name: the branch, as a path of the tree.
      leaves: number of leaves.
      total: bytes of their moments.
      resident: bytes of them in the devices' own memory.
    """

    name: str
    leaves: int
    total: int
    resident: int

    @property
    def on_host(self) -> int:
        """Bytes that are not resident."""
        return self.total - self.resident


@dataclasses.dataclass(frozen=True)
class MemoryReport:
    """Where the moments are. Prints as a table.

    Attributes:
      devices: one `DeviceMemory` per device of this process.
      groups: one `LeafGroup` for each branch of the parameters' tree, where it first branches.
      elsewhere: bytes of moments on the devices of other processes (`jax.distributed`). Only a
        report made there tells how many of them are resident.
    """

    devices: tuple[DeviceMemory, ...]
    groups: tuple[LeafGroup, ...] = ()
    elsewhere: int = 0

    @property
    def total(self) -> int:
        """Bytes of moments, over all devices of this process."""
        return sum(device.total for device in self.devices)

    @property
    def resident(self) -> int:
        """Bytes of moments in the devices' own memory."""
        return sum(device.resident for device in self.devices)

    @property
    def on_host(self) -> int:
        """Bytes of moments in host memory that a GPU reaches over its link, or on disk."""
        return sum(device.on_host for device in self.devices)

    @property
    def replay(self) -> int:
        """Bytes of the second copies that ``replay=True`` keeps; part of the total."""
        return sum(device.replay for device in self.devices)

    def to_dict(self, prefix: str = "moments/") -> dict[str, float]:
        """All sizes as numbers with flat names, for loggers such as W&B and TensorBoard.

        Args:
          prefix: what all names begin with.

        Returns:
          Bytes by name: ``moments/total``, ``resident``, ``on_host``, ``replay`` and ``elsewhere``,
          and for each device ``moments/cuda:0/total`` and so on, with ``budget``, ``free``,
          ``pool``, ``pool_in_use`` and ``moved`` where they are known, ``moving_seconds``, and
          ``evicted``, which is 0 or 1. All values are numbers; JSON takes them.

        Example:
          >>> import jax.numpy as jnp, paged_optax
          >>> tx = paged_optax.scale_by_paged_adam8bit()
          >>> params = {"w": jnp.ones((1024, 1024))}
          >>> _, state = tx.update(params, tx.init(params))
          >>> numbers = paged_optax.memory_report(state).to_dict()
          >>> print(numbers["moments/total"], numbers["moments/cpu:0/resident"])
          2130432 2130432
        """
        totals = ("total", "resident", "on_host", "replay", "elsewhere")
        numbers: dict[str, float] = {f"{prefix}{name}": getattr(self, name) for name in totals}
        for device in self.devices:
            fields = dataclasses.asdict(device) | {"on_host": device.on_host}
            for name, value in fields.items():
                if isinstance(value, int | float):  # and neither None nor text
                    numbers[f"{prefix}{device.device}/{name}"] = +value
        return numbers

    def __str__(self) -> str:
        columns = ["total", "resident", "on_host", *["replay"] * (self.replay > 0)]
        rows = list(self.devices)
        if len(rows) != 1:
            name = "here" if self.elsewhere else "all"
            rows.append(DeviceMemory(name, self.total, self.resident, self.replay))
        lines = _table("moments", columns, [(row.device, row) for row in rows])
        if self.elsewhere:
            lines.append(f"{'elsewhere':<10}{format_bytes(self.elsewhere):>12}")
        if len(self.groups) > 1:
            groups = sorted(self.groups, key=lambda group: -group.total)
            named = [(f"{group.name} ({group.leaves})", group) for group in groups[:MAX_ROWS]]
            lines += ["", *_table("leaves", columns[:3], named)]
            if len(groups) > MAX_ROWS:
                lines.append(f"... and {len(groups) - MAX_ROWS} smaller groups")
        for device in self.devices:
            lines += _describe(device)
        return "\n".join(lines)


def _describe(device: DeviceMemory) -> list[str]:
    """Lines on the memory of a device around the moments."""
    if device.free is None:
        return ["", f"{device.device}: {device.trouble}"] if device.trouble else []
    budget = "no budget" if device.budget is None else f"budget {format_bytes(device.budget)}"
    line = f"{device.device}: {device.memory} memory, {budget}, {format_bytes(device.free)} free"
    if device.pool is not None and device.pool_in_use is not None:
        line += (
            f", XLA's pool {format_bytes(device.pool)} ({format_bytes(device.pool_in_use)} used)"
        )
    if device.moved:
        line += f"; moved {format_bytes(device.moved)} in {device.moving_seconds:.2f} s"
    return ["", line, *[device.advice] * (device.advice != "")]


def _table(title: str, columns: Sequence[str], rows: Sequence[tuple[str, Any]]) -> list[str]:
    """Lines with a name and, for each column, that attribute of the row."""
    width = max(10, *(len(name) + 1 for name, _ in rows)) if rows else 10
    lines = [f"{title:<{width}}" + "".join(f"{c.replace('_', ' '):>12}" for c in columns)]
    for name, row in rows:
        numbers = "".join(f"{format_bytes(getattr(row, c)):>12}" for c in columns)
        lines.append(f"{name:<{width}}{numbers}")
    return lines


def memory_report(opt_state: Any) -> MemoryReport:
    """Reports where the moments of an optimizer state are.

    A state's first update makes its moments; before it, the report is empty.

    Args:
      opt_state: any optax state, nnx.Optimizer or TrainState with paged states in it.

    Returns:
      A `MemoryReport` in which all paged states are added up.

    Raises:
      ValueError: if there is no paged state.
      RuntimeError: if the moments were released or are not in this process.

    Example:
      >>> import jax.numpy as jnp, paged_optax
      >>> tx = paged_optax.scale_by_paged_adam8bit()
      >>> params = {"w": jnp.ones((1024, 1024))}
      >>> _, state = tx.update(params, tx.init(params))
      >>> print(f"{paged_optax.memory_report(state).total / 1024**2:.2f} bytes per parameter")
      2.03 bytes per parameter
    """
    with named("memory_report"):
        reports, elsewhere = _describe_states(find_states(opt_state))
    devices: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for report in reports:
        devices.setdefault((report["platform"], report["ordinal"]), []).append(report)
    return MemoryReport(
        tuple(_device_memory(*device, reports) for device, reports in devices.items()),
        _groups(reports),
        elsewhere,
    )


def _describe_states(paged_states: list[Any]) -> tuple[list[dict[str, Any]], int]:
    """What C++ says of each state on each device, and the bytes on devices of other processes."""
    states = {read_token(state): state for state in paged_states}
    tell_refusals()
    newest = {handle: (version, state) for (handle, version), state in states.items()}
    reports, elsewhere = [], 0
    for handle, (version, state) in newest.items():  # several versions of one state count once
        if find_staged(handle, version):
            continue  # like a state that init returned
        here = [report | {"handle": handle} for report in _ext.describe(handle, version)]
        reports += here
        if here:  # shards are equally large on all devices
            sharding = jnp.asarray(state.token).sharding
            num_others = len(sharding.device_set) - len(sharding.addressable_devices)
            elsewhere += num_others * here[0]["total"]
    return reports, elsewhere


def _device_memory(platform: str, ordinal: int, reports: list[dict[str, Any]]) -> DeviceMemory:
    def total(key):
        return sum(report[key] for report in reports)

    on_gpu = platform == "cuda"
    pool, in_use = xla_pool(ordinal) if on_gpu else (None, None)
    return DeviceMemory(
        device=f"{platform}:{ordinal}",
        total=total("total"),
        resident=total("resident"),
        replay=total("replay"),
        memory="+".join(sorted({report["memory"] for report in reports})),
        budget=min((r["budget"] for r in reports if on_gpu and r["budget"] >= 0), default=None),
        moved=total("moved"),
        moving_seconds=total("moving_seconds"),
        free=_ext.free_device_bytes(ordinal) if on_gpu else None,
        pool=pool,
        pool_in_use=in_use,
        evicted=any(report["limit"] >= 0 for report in reports),
        trouble=" ".join(filter(None, (report["trouble"] for report in reports))),
    )


def _groups(reports: list[dict[str, Any]]) -> tuple[LeafGroup, ...]:
    """Adds up leaves by where the tree first branches."""
    sizes: dict[tuple[str, ...], list[int]] = {}
    seen: set[tuple[tuple[str, ...], int]] = set()  # several devices report the same leaf
    for report in reports:
        treedef = _names.trees.get(report["tree"])
        if treedef is None:  # the update was not traced in this process
            return ()
        try:
            numbered = jax.tree.unflatten(treedef, range(treedef.num_leaves))
        except Exception:  # the user's container does not take numbers
            return ()
        for path, index in jax.tree_util.tree_leaves_with_path(numbered):
            name = tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
            leaf = (name, report["handle"])
            row = sizes.setdefault(name, [0, 0, 0])
            total, resident = report["leaf_bytes"][index]
            if (
                report["memory"] == "file"
            ):  # the system tells how much of it is in RAM, not which leaves
                resident = total * report["resident"] // max(1, report["total"])
            added = (int(leaf not in seen), total, resident)
            seen.add(leaf)
            row[:] = [a + b for a, b in zip(row, added, strict=True)]
    paths = list(sizes)
    shared = 0  # keys that all paths begin with
    while paths and all(path[: shared + 1] == paths[0][: shared + 1] for path in paths):
        if len(paths[0]) <= shared:
            break
        shared += 1
    groups: dict[str, list[int]] = {}
    for path, row in sizes.items():
        group = groups.setdefault("/".join(path[: shared + 1]), [0, 0, 0])
        group[:] = [a + b for a, b in zip(group, row, strict=True)]
    return tuple(LeafGroup(name, *row) for name, row in groups.items())
