"""Which states have moments in this process, also those that nobody can name any more."""

import contextlib
import dataclasses
from typing import Any

from . import _ext
from ._bytes import format_bytes
from ._local import local_handle
from ._watch import await_steps, live_tokens


@dataclasses.dataclass(frozen=True)
class StateInfo:
    """A state of this process. Prints as a line.

    Attributes:
      handle: the number that its tokens begin with.
      version: the newest; 0 if it was never updated, and has no moments yet.
      count: updates that the newest state has seen; None if it was restored and not updated.
      nbytes: of its moments, on all devices of this process.
      resident: bytes of them in the devices' own memory.
      devices: where they are, as `memory_report` names devices.
      age: seconds since the first update, or since it was made if there was none.
      names: paths of its leaves; empty if they are not known.
      is_held: whether some array of this process is a token of it. If none is, the state cannot be
        updated any more, unless a copy is elsewhere, as a NumPy array or in a file.
      trouble: what is wrong with its memory, such as a disk that took no writes; empty if nothing
        is.
    """

    handle: int
    version: int
    count: int | None
    nbytes: int
    resident: int
    devices: tuple[str, ...]
    age: float
    names: tuple[str, ...]
    is_held: bool
    trouble: str = ""

    def __str__(self) -> str:
        what = f"version {self.version}, {format_bytes(self.nbytes)} on {', '.join(self.devices)}"
        if not self.devices:
            what = "never updated, no moments"
        names = f", leaves {', '.join(self.names[:2])}" + ", ..." * (len(self.names) > 2)
        held = "" if self.is_held else ", nobody holds it"
        trouble = f"; {self.trouble}" if self.trouble else ""
        text = f"state {self.handle}: {what}, {self.age:.0f} s old"
        return f"{text}{names * bool(self.names)}{held}{trouble}"


def states() -> list[StateInfo]:
    """Lists the states that have moments in this process, and those that may get some.

    It finds states that are lost: those that a function made and did not return, that were made
    inside of `jax.lax.scan`, or whose notebook cell ran again. Free them with `release`. Waits for
    the steps under way, and looks at every array of the process.

    Returns:
      One entry for each state, oldest first.

    Example:
      >>> import jax.numpy as jnp, paged_optax
      >>> tx = paged_optax.scale_by_paged_adam8bit()
      >>> params = {"w": jnp.ones((1024, 1024))}
      >>> _, lost = tx.update(params, tx.init(params))
      >>> del lost
      >>> freed = paged_optax.release([s for s in paged_optax.states() if not s.is_held])
      >>> freed >= 2 * 1024**2
      True
    """
    await_steps()
    arenas, unused = _ext.list_states()
    held = _held_handles()
    reports: dict[int, list[dict[str, Any]]] = {}
    for report in arenas:
        reports.setdefault(report["handle"], []).append(report)
    found = [_of_reports(handle, here, handle in held) for handle, here in reports.items()]
    found += [
        StateInfo(handle, 0, 0, 0, 0, (), age, (), handle in held)
        for handle, age in unused
        if handle not in reports
    ]
    return sorted(found, key=lambda entry: -entry.age)


def _of_reports(handle: int, reports: list[dict[str, Any]], is_held: bool) -> StateInfo:
    first = reports[0]
    try:
        newest = _ext.newest(handle)
    except RuntimeError:  # the devices have different moments
        newest = None
    version, count, *_ = newest or (first["version"], None, 0, 0)
    return StateInfo(
        handle,
        version,
        count,
        sum(report["total"] for report in reports),
        sum(report["resident"] for report in reports),
        tuple(f"{report['platform']}:{report['ordinal']}" for report in reports),
        max(report["age"] for report in reports),
        tuple(first["names"]),
        is_held,
        " ".join(dict.fromkeys(filter(None, (report["trouble"] for report in reports)))),
    )


def _held_handles() -> set[int]:
    """The handles in all arrays that may be tokens."""
    handles = set()
    for array in live_tokens():
        with contextlib.suppress(RuntimeError):  # of a program that failed, or donated meanwhile
            handles.add(local_handle(array))
    return handles - {None}


def lost_bytes(platform: str, ordinal: int) -> tuple[int, int]:
    """How many states on a device nobody holds, and how many bytes they have there."""
    device = f"{platform}:{ordinal}"
    lost = [s for s in states() if device in s.devices and not s.is_held]
    return len(lost), sum(entry.nbytes for entry in lost)
