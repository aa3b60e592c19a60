"""The arithmetic of a plan: what one optimizer takes of a GPU and of the host."""

import dataclasses
import math
from typing import Any

from ._bytes import format_bytes
from ._forecast import Kept
from ._plan_model import Model

RESERVE = 1 / 32  # of XLA's pool, for the holes between its buffers
PREALLOCATED = 0.75  # what XLA takes of a GPU unless told otherwise
# The part of a link's rate that steps reach, and the most bytes per second that they reach on any
# link (benchmarks/paging.py; the table is in docs/paging.md).
LINK_SHARE, STEP_RATE = 0.95, 41.5e9


@dataclasses.dataclass(frozen=True)
class PlannedUsage:
    """What training takes with one optimizer, on each GPU. Sizes are in bytes.

    Attributes:
      optimizer: its name.
      state: optimizer state in XLA's pool.
      temporaries: bytes for activations and everything else in XLA's pool; None if not known.
      pool: the most that XLA's pool has in use at one time, as far as it is known.
      moments: paged moments, wherever they are.
      resident: those of them that have room in the GPU's memory.
      host: host memory for moments, of all GPUs of this host. Resident ones need it too.
      host_milliseconds: what moments on the host add to a step, because they cross the link.
      mem_fraction: the ``XLA_PYTHON_CLIENT_MEM_FRACTION`` to set; None if the default will do.
      paging: the option of the optimizer that goes with it, as Python text; "" without moments.
      problems: why it does not fit; empty if it does.
    """

    optimizer: str
    state: int
    temporaries: int | None
    pool: int
    moments: int
    resident: int
    host: int
    host_milliseconds: float
    mem_fraction: float | None
    paging: str
    problems: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether there is room for everything that is known."""
        return not self.problems

    @property
    def on_host(self) -> int:
        """Bytes of moments outside of the GPU's memory."""
        return self.moments - self.resident

    @property
    def reserve(self) -> int:
        """Bytes of XLA's pool that should be free, for the holes between its buffers."""
        return math.ceil(self.pool * RESERVE)

    def to_dict(self) -> dict[str, Any]:
        """All numbers as a dict for `json.dumps`."""
        about = dataclasses.asdict(self)
        about["problems"] = list(self.problems)
        return about | {"fits": self.fits, "on_host": self.on_host}


@dataclasses.dataclass(frozen=True)
class Room:
    """What there is. Sizes are in bytes.

    Attributes:
      card: memory of each GPU.
      context: of that, what CUDA and its libraries take.
      host: host memory for moments.
      devices: GPUs of this host.
      link: bytes per second between the host and a GPU, each way while both are busy.
    """

    card: int
    context: int
    host: int
    devices: int
    link: float

    def usage(self, model: Model, kept: Kept, optimizer: str) -> PlannedUsage:
        """What training takes with an optimizer."""
        peak = model.param_bytes + model.frozen + model.gradients + kept.in_xla
        temporaries = model.paged_temporaries if kept.states else model.temporaries
        peak += temporaries or 0
        pool, fraction = self._pool(kept, peak, is_known=temporaries is not None)
        moments = kept.forecast(self.card - self.context - pool)
        host = moments["on_gpu"] * self.devices
        rate = min(LINK_SHARE * self.link, STEP_RATE)
        return PlannedUsage(
            optimizer=optimizer,
            state=kept.in_xla,
            temporaries=temporaries,
            pool=peak,
            moments=moments["on_gpu"],
            resident=moments["resident"],
            host=host,
            host_milliseconds=1000 * moments["host_traffic"] / rate,
            mem_fraction=fraction,
            paging=_paging(kept, moments["resident"]),
            problems=tuple(self._problems(peak, host)),
        )

    def _pool(self, kept: Kept, peak: int, is_known: bool) -> tuple[int, float | None]:
        """The size to give to XLA's pool, and the fraction that does it; None for the default."""
        most = self.card - self.context
        wanted = min(peak + math.ceil(peak * RESERVE), most)
        default = int(PREALLOCATED * self.card)
        if not is_known and wanted <= default:
            return default, None
        if wanted <= default <= most:
            residents = [kept.forecast(most - size)["resident"] for size in (wanted, default)]
            if residents[0] == residents[1]:
                return default, None
        fraction = math.ceil(1000 * wanted / self.card) / 1000
        if fraction * self.card > most:
            fraction = math.floor(1000 * most / self.card) / 1000
        return int(fraction * self.card), fraction

    def _problems(self, peak: int, host: int):
        taken = peak + self.context
        if taken > self.card:
            yield (
                f"XLA's pool needs {format_bytes(peak)} and CUDA {format_bytes(self.context)},"
                f" {format_bytes(taken - self.card)} more than the card's"
                f" {format_bytes(self.card)}"
            )
        if host > self.host:
            yield (
                f"moments need {format_bytes(host)} of host memory, wherever they are, and there"
                f" are {format_bytes(self.host)}"
            )


def _paging(kept: Kept, resident: int) -> str:
    budgets = {state["device_bytes"] for state in kept.states}
    if not budgets:
        return ""
    if not resident:
        return "Paging(device_bytes=0)"
    budget = max(budgets)
    return "Paging()" if budget < 0 else f"Paging(device_bytes={budget})"
