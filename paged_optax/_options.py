"""Options that are fixed when a transformation is built: how moments are stored, and where."""

import dataclasses
import operator
import os

from ._tables import FORMATS, PARAM_ROUNDINGS
from ._validate import check_choice, check_kind

NON_FINITE = ("propagate", "skip_element", "skip_step")


@dataclasses.dataclass(frozen=True)
class Quantization:
    """How moments are stored.

    Attributes:
      codec: the 8-bit code; either takes 2.03 bytes per parameter for both moments, in blocks of
        256 elements. ``"ratio"`` stores second moments as small floats and first moments as
        multiples of their square roots, both rounded stochastically; updates follow those of
        float32 moments an order of magnitude closer than with the other. ``"dynamic"`` is the code
        of bitsandbytes, to the bit. In it a second moment far below the largest of its block is
        zero, and steps explode; and second moments do not decay.
      min_size: leaves with fewer elements than this keep float32 moments (8 bytes per parameter).
        Small leaves are biases and norms, which save nothing and tolerate least. Inside
        `jax.shard_map` a leaf is the device's part of it.
      seed: chooses the random bits of stochastic rounding. They follow from the seed, the names of
        the leaves, the number of the step and the place in a leaf (or in a device's part of it), so
        nothing is stored and a run can be repeated to the bit. Moments in the ``"dynamic"`` code
        need none.

    Raises:
      ValueError: for an unknown codec or a negative size.
    """

    codec: str = "ratio"
    min_size: int = 4096
    seed: int = 0

    def __post_init__(self):
        for name in ("min_size", "seed"):
            value = getattr(self, name)
            if isinstance(value, bool) or not hasattr(value, "__index__"):
                raise TypeError(f"{name} is {value!r}; it must be an int")
            object.__setattr__(self, name, operator.index(value))
        if self.codec not in FORMATS:
            known = ", ".join(map(repr, sorted(FORMATS)))
            raise ValueError(f"unknown codec {self.codec!r}; there are {known}")
        if self.min_size < 0:
            raise ValueError(
                f"min_size is {self.min_size}; it counts elements and cannot be negative"
            )


@dataclasses.dataclass(frozen=True)
class Paging:
    """Where moments live.

    On a GPU as many of a state's moments as there is room for, counted from the first leaf on, are
    in device memory, and a step reads and writes the others in host memory, in place, at the rate
    of the link. Every step looks at the free device memory. When that gets short, moments make
    room; when there is more for a while, they come back. This happens beside training, 128 MiB for
    each step on average, and changes no bit of the results. The states on a GPU share what there is
    fairly (max-min).

    A state keeps the options that it was first updated with; `evict` and `prefetch` change where
    its moments are.

    Attributes:
      device_bytes: device memory that the moments of all states on a GPU may take together; None
        for whatever is free, 0 for everything on the host. States with other limits may go on where
        this one stops.
      headroom_bytes: device memory to leave free beside the moments; of several states, the most
        that one asks for.
      memory: ``"managed"``, CUDA managed memory, or ``"pinned"``, pinned host memory and plain
        device memory, which steps use in the same way. Where managed memory does not work (WSL and
        some virtual GPUs) pinned memory is taken instead, with a warning.
      directory: on the CPU, a folder for a file that holds the moments, so that they may be larger
        than RAM and the operating system pages them to disk. The file has no name, and is gone when
        the state is released or the process ends in whatever way. None for plain memory. A step on
        a GPU refuses it.

    Raises:
      ValueError: for negative numbers of bytes, another kind of memory, or an empty directory.
      TypeError: for numbers of bytes that are not ints, or a directory that is not a path.
    """

    device_bytes: int | None = None
    headroom_bytes: int = 512 * 2**20
    memory: str = "managed"
    directory: str | os.PathLike[str] | None = None

    def __post_init__(self):
        for name in ("device_bytes", "headroom_bytes"):
            value = getattr(self, name)
            if not isinstance(value, int) and (value is not None or name == "headroom_bytes"):
                raise TypeError(f"{name} is {value!r}; it must be an int, a number of bytes")
            if value is not None and value >= 2**63:
                raise ValueError(f"{name} is {value}; no machine has 2**63 bytes")
            if value is not None and value < 0:
                raise ValueError(f"{name} is {value}; it counts bytes and cannot be negative")
        if self.memory not in ("managed", "pinned"):
            raise ValueError(f"unknown memory {self.memory!r}; it is 'managed' or 'pinned'")
        if self.directory is None:
            return
        if not isinstance(self.directory, str | os.PathLike):
            raise TypeError(f"directory is {self.directory!r}; it must be the path of a folder")
        if not os.fspath(self.directory):
            raise ValueError("directory is empty; name a folder, or leave it out")


@dataclasses.dataclass(frozen=True)
class Options:
    """The keyword options that all paged optimizers have; see `paged_adamw8bit`."""

    replay: bool
    non_finite: str
    quantization: Quantization
    paging: Paging
    param_rounding: str


def make_options(
    *,
    replay: bool,
    non_finite: str,
    quantization: Quantization | None,
    paging: Paging | None,
    param_rounding: str = "nearest",
) -> Options:
    """Checks the options, and takes the defaults of those that are None."""
    quantization = Quantization() if quantization is None else quantization
    paging = Paging() if paging is None else paging
    check_choice("non_finite", non_finite, NON_FINITE)
    check_choice("param_rounding", param_rounding, PARAM_ROUNDINGS)
    check_kind("quantization", quantization, Quantization)
    check_kind("paging", paging, Paging)
    return Options(bool(replay), non_finite, quantization, paging, param_rounding)
