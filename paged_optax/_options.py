"""Options that are fixed when a transformation is built: how moments are stored, and where."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Quantization:
    """How moments are stored.

    Attributes:
      codec: the 8-bit code; either takes 2.03 bytes per parameter for both moments, in blocks of
        256 elements. ``"dynamic"`` is that of bitsandbytes, to the bit. ``"ratio"`` follows float32
        moments an order of magnitude closer: it stores second moments as small floats and first
        moments as multiples of their square roots, both rounded stochastically.
      min_size: leaves with fewer elements than this keep float32 moments (8 bytes per parameter).
        Small leaves are biases and norms, which save nothing and tolerate least. Inside
        `jax.shard_map` a leaf is the device's part of it.
      seed: chooses the random bits of stochastic rounding. They follow from the seed, the names of
        the leaves, the number of the step and the place in a leaf (or in a device's part of it), so
        nothing is stored and a run can be repeated to the bit.

    Raises:
      ValueError: for an unknown codec or a negative size.
    """

    codec: str = "ratio"
    min_size: int = 4096
    seed: int = 0

    def __post_init__(self):
        for name in ("min_size", "seed"):
            value = getattr(self, name)
            if not isinstance(value, int):
                raise TypeError(f"{name} is {value!r}; it must be an int")
        if self.codec not in ("dynamic", "ratio"):
            raise ValueError(f"unknown codec {self.codec!r}; there are 'dynamic' and 'ratio'")
        if self.min_size < 0:
            raise ValueError(
                f"min_size is {self.min_size}; it counts elements and cannot be negative"
            )


@dataclasses.dataclass(frozen=True)
class Paging:
    """Where moments live on a GPU; on a CPU there is one place.

    Moments of one state on one GPU are placed as a whole, when the state is first used: in device
    memory if they fit, else in host memory, which the GPU then reads and writes in place at every
    step.

    Attributes:
      device_bytes: device memory that the moments of all states on a GPU may take together; None
        for whatever is free, 0 for everything on the host.
      headroom_bytes: device memory that must stay free beside the moments.

    Raises:
      ValueError: for negative numbers of bytes.
      TypeError: for anything but ints (device_bytes may be None).
    """

    device_bytes: int | None = None
    headroom_bytes: int = 512 * 2**20

    def __post_init__(self):
        for name in ("device_bytes", "headroom_bytes"):
            value = getattr(self, name)
            if not isinstance(value, int) and (value is not None or name == "headroom_bytes"):
                raise TypeError(f"{name} is {value!r}; it must be an int, a number of bytes")
            if value is not None and value >= 2**63:
                raise ValueError(f"{name} is {value}; no machine has 2**63 bytes")
            if value is not None and value < 0:
                raise ValueError(f"{name} is {value}; it counts bytes and cannot be negative")
