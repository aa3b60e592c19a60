"""Options that are fixed when a transformation is built: how moments are stored, and where."""

import dataclasses
import operator
import os
from collections.abc import Callable
from typing import Any

import jax

from ._bytes import check_bytes
from ._tables import FORMAT_NAMES, PARAM_ROUNDINGS
from ._validate import check_choice, check_kind, check_no_dtype

NON_FINITE = ("propagate", "skip_element", "skip_step")
MISSING = ("error", "restart")


@dataclasses.dataclass(frozen=True)
class Quantization:
    """How moments are stored.

    Attributes:
      codec: the format of large leaves: a name, a tree of names with the same structure as (or a
        prefix of) the parameters, or a callable that makes one from a tree like the parameters.
        ``"ratio"`` and ``"dynamic"`` take 1.02 bytes per parameter and moment, in blocks of 256
        elements. ``"ratio"`` stores second moments as small floats and first moments as multiples
        of their square roots (or of the largest in the block, for optimizers without second
        moments), and rounds both at random with mean zero. Updates follow those of float32 moments
        an order of magnitude closer than with ``"dynamic"``, the code of bitsandbytes, to the bit.
        Its second moments underflow to zero next to a large neighbour, which makes steps explode,
        and they fail to decay. ``"ratio6"`` is ``"ratio"`` with 6 bits: it takes 0.77 bytes, and
        its errors are 6 to 16 times as large. ``"ratio4"`` has 4 bits and takes 0.52 bytes. It is
        experimental: updates are a tenth to a half too large. ``"bfloat16"`` takes 2 bytes and
        rounds at random with mean zero. ``"float32"`` takes 4 bytes and rounds nothing.
      min_size: leaves with fewer elements than this have float32 moments whatever the codec. Small
        leaves are biases and norms: they save nothing and tolerate least. Inside `jax.shard_map`
        the device's part of a leaf counts.
      seed: chooses the random bits for rounding. They follow from the seed, the name of the leaf,
        the number of the step and the place in the leaf (or in a device's part of it). Nothing is
        stored for them, and a run can be repeated to the bit. Moments in the ``"dynamic"`` and
        ``"float32"`` formats need none.

    Raises:
      ValueError: for an unknown codec or a negative size. From `update`: for an unknown name in a
        tree, or a tree that does not fit the parameters.
      TypeError: for a size or a seed that is not an int.

    Example:
      Embeddings in 32 bits, everything else in 8:

      >>> import jax, jax.numpy as jnp, paged_optax
      >>> def codec(params):
      ...   return jax.tree_util.tree_map_with_path(
      ...       lambda path, _: "float32" if "embed" in jax.tree_util.keystr(path) else "ratio",
      ...       params)
      >>> params = {"embed": jnp.ones((100, 64)), "w": jnp.ones((64, 64))}
      >>> tx = paged_optax.paged_adamw8bit(1e-3, quantization=paged_optax.Quantization(codec))
      >>> _, state = tx.update(params, tx.init(params), params)
      >>> for name, array in paged_optax.export_moments(state).items():
      ...   if name.endswith("mu"):
      ...     print(name, array.dtype)
      0.0['embed'].0.mu float32
      0.1['w'].0.mu uint8

    References:
      Dettmers et al., `8-bit Optimizers via Block-wise Quantization
      <https://arxiv.org/abs/2110.02861>`_, 2022, for ``"dynamic"``. ``"ratio"`` is of this library:
      docs/numerics.md.
    """

    codec: str | Any | Callable[[Any], Any] = "ratio"
    min_size: int = 4096
    seed: int = 0

    def __post_init__(self):
        for name in ("min_size", "seed"):
            value = getattr(self, name)
            if isinstance(value, bool) or not hasattr(value, "__index__"):
                raise TypeError(f"{name} is {value!r}; it must be an int")
            object.__setattr__(self, name, operator.index(value))
        if isinstance(self.codec, str):
            _check_codec(self.codec)
        if self.min_size < 0:
            raise ValueError(
                f"min_size is {self.min_size}; it counts elements and cannot be negative"
            )

    def formats(self, tree: Any) -> list[str]:
        """The format of each leaf of a tree of arrays, in order.

        Raises:
          ValueError: for an unknown name, or names that do not fit the tree.
        """
        names = self.codec(tree) if callable(self.codec) else self.codec

        def choose(name: Any, leaf: Any) -> str:
            _check_codec(name)
            return name if leaf.size >= self.min_size else "float32"

        chosen = jax.tree.map(
            lambda name, part: jax.tree.map(lambda leaf: choose(name, leaf), part), names, tree
        )
        return jax.tree.leaves(chosen)


def _check_codec(name: Any) -> None:
    if name not in FORMAT_NAMES:
        known = ", ".join(map(repr, sorted(FORMAT_NAMES)))
        raise ValueError(f"unknown codec {name!r}; there are {known}")


@dataclasses.dataclass(frozen=True)
class Paging:
    """Where moments live.

    On a GPU, as many moments as fit stay in device memory, in leaf order. The kernel reads and
    writes the rest directly in host memory, at the speed of the link. Every step looks at the free
    device memory: when it gets short, moments make room, and when there has been more for a while,
    they come back. They move while training goes on, 128 MiB per step on average, and no bit of the
    results depends on it. The states on a GPU share its free memory fairly (max-min).

    A state keeps the options of its first update; `evict` and `prefetch` change where its moments
    are.

    Attributes:
      device_bytes: device memory in bytes that the moments of all states on a GPU may take
        together; None for whatever is free, 0 for everything on the host. States with other limits
        may go on where this one stops.
      headroom_bytes: device memory in bytes to leave free next to the moments. Of several states,
        the largest counts.
      memory: ``"managed"`` for CUDA managed memory, or ``"pinned"`` for pinned host memory and
        plain device memory, which steps use in the same way. Where managed memory does not work
        (WSL and some virtual GPUs) pinned memory is taken instead, with a warning.
      directory: on the CPU, a folder for a file that holds the moments, so that they may be larger
        than RAM and the operating system pages them to disk. The file has no name. It is gone when
        the state is released or the process ends in whatever way. None for plain memory. A step on
        a GPU refuses a directory.

    Raises:
      ValueError: for negative numbers of bytes, another kind of memory, or a directory whose name
        is empty or not UTF-8.
      TypeError: for numbers of bytes that are not ints, or a directory that is not a path.

    Example:
      >>> import jax.numpy as jnp, paged_optax
      >>> on_the_host = paged_optax.Paging(device_bytes=0)
      >>> tx = paged_optax.paged_adamw8bit(1e-3, paging=on_the_host)
      >>> params = {"w": jnp.ones((1024, 1024))}
      >>> _, state = tx.update(params, tx.init(params), params)
      >>> paged_optax.memory_report(state).devices[0].budget is None  # 0 on a GPU
      True
    """

    device_bytes: int | None = None
    headroom_bytes: int = 512 * 2**20
    memory: str = "managed"
    directory: str | os.PathLike[str] | None = None

    def __post_init__(self):
        for name in ("device_bytes", "headroom_bytes"):
            value = getattr(self, name)
            if value is None and name == "device_bytes":
                continue
            value = check_bytes(name, value)
            if value >= 2**63:
                raise ValueError(f"{name} is {value}; no machine has 2**63 bytes")
            object.__setattr__(self, name, value)
        if self.memory not in ("managed", "pinned"):
            raise ValueError(f"unknown memory {self.memory!r}; it is 'managed' or 'pinned'")
        if self.directory is None:
            return
        if not isinstance(self.directory, str | os.PathLike):
            raise TypeError(f"directory is {self.directory!r}; it must be the path of a folder")
        path = os.fspath(self.directory)
        if not isinstance(path, str):
            raise TypeError(f"directory is {path!r}; it must be text: os.fsdecode(directory)")
        if not path:
            raise ValueError("directory is empty; name a folder, or leave it out")
        if "\0" in path or any("\ud800" <= letter <= "\udfff" for letter in path):
            raise ValueError(
                f"directory is {path!r}; a compiled program can only hold names of UTF-8. Name"
                " another folder, or a symbolic link to this one."
            )


@dataclasses.dataclass(frozen=True)
class Options:
    """The keyword options that all paged optimizers have; see `paged_adamw8bit`."""

    replay: bool
    non_finite: str
    quantization: Quantization
    paging: Paging
    param_rounding: str
    missing: str


def make_options(
    *,
    replay: bool,
    non_finite: str,
    quantization: Quantization | None,
    paging: Paging | None,
    param_rounding: str = "nearest",
    missing: str = "error",
    mu_dtype: None = None,
    accumulator_dtype: None = None,
) -> Options:
    """Checks the options, and takes the defaults of those that are None."""
    check_no_dtype("mu_dtype", mu_dtype)
    check_no_dtype("accumulator_dtype", accumulator_dtype)
    quantization = Quantization() if quantization is None else quantization
    paging = Paging() if paging is None else paging
    check_choice("non_finite", non_finite, NON_FINITE)
    check_choice("param_rounding", param_rounding, PARAM_ROUNDINGS)
    check_choice("missing", missing, MISSING)
    check_kind("quantization", quantization, Quantization)
    check_kind("paging", paging, Paging)
    return Options(bool(replay), non_finite, quantization, paging, param_rounding, missing)
