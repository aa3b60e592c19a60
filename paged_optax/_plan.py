"""Will it fit? `plan` adds up what a training step takes, before anything is allocated."""

import dataclasses
from typing import Any

import optax

from . import _ext
from ._adam import paged_adamw8bit
from ._bytes import parse_bytes
from ._forecast import Kept, kept_by
from ._plan_model import (
    Model,
    devices_here,
    frozen_bytes,
    given_model,
    named_model,
    with_analysis,
    with_temporaries,
)
from ._plan_room import PlannedUsage, Room
from ._plan_text import describe

CONTEXT = 680 * 2**20  # of CUDA, cuDNN and cuBLAS: 635 to 680 MiB on an H200
LINK = 50e9  # bytes per second, each way at once: PCIe 5 x16 (docs/paging.md)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a training step takes on each GPU, and whether it fits. Prints as a table.

    Attributes:
      subject: what is trained, in words.
      card: bytes of the GPU's memory.
      host: bytes of host memory that moments may take.
      context: bytes of the GPU outside of XLA's pool, for CUDA and its libraries.
      frozen: bytes of weights that are not trained, and of other arguments of a compiled step.
      params: bytes of the trained parameters.
      gradients: bytes of their gradients; 0 where a compiled step has them among its temporaries.
      link: bytes per second between host and GPU, each way while both are busy.
      usage: the `PlannedUsage` with the optimizer.
      other: the same with `optax.adamw`.
    """

    subject: str
    card: int
    host: int
    context: int
    frozen: int
    params: int
    gradients: int
    link: float
    usage: PlannedUsage
    other: PlannedUsage

    @property
    def fits(self) -> bool:
        """Whether it fits with the optimizer; where activations are not known, without them."""
        return self.usage.fits

    @property
    def is_tight(self) -> bool:
        """Whether it fits without the reserve that XLA's pool should have."""
        needed = self.usage.pool + self.usage.reserve + self.context
        return self.fits and self.usage.temporaries is not None and needed > self.card

    @property
    def total(self) -> int:
        """Bytes of the card that are in use: by XLA, by resident moments and by CUDA."""
        return self.usage.pool + self.usage.resident + self.context

    def to_dict(self) -> dict[str, Any]:
        """All numbers as a dict for `json.dumps`."""
        about = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        about |= {"usage": self.usage.to_dict(), "other": self.other.to_dict()}
        derived = ("fits", "is_tight", "total")
        return about | {name: getattr(self, name) for name in derived}

    def __str__(self) -> str:
        return describe(self)


def plan(
    model: Any,
    optimizer: optax.GradientTransformation | None = None,
    *,
    card: int | str | None = None,
    host: int | str | None = None,
    rank: int | None = None,
    base: str | None = None,
    batch: int | None = None,
    sequence: int | None = None,
    clip: bool | None = None,
    frozen: Any = None,
    compiled: Any = None,
    activations: int | str | None = None,
    context: int | str = CONTEXT,
    link: float | None = None,
    name: str | None = None,
) -> Plan:
    """Says whether training fits on a GPU, and how to set it up. Nothing is allocated.

    The bytes of moments and of other optimizer state are exact: the optimizer is traced, and the
    library lays its moments out as the first step would. Its budgets and headroom count. Of a
    compiled step, XLA itself says what it needs. For a named model this is an estimate, for layers
    that are scanned and computed again in the backward pass; docs/planning.md has the formula.

    Args:
      model: the trained parameters, as a tree of arrays or `jax.ShapeDtypeStruct`s (from
        `jax.eval_shape`); those with a sharding count with one device's part. Or the name of a
        published shape: ``"7b"``, ``"8b"``, ``"13b"``, ``"24b"``, ``"32b"``, ``"33b"``, ``"65b"``
        or ``"70b"``.
      optimizer: any transformation, alone or in a chain. By default `paged_adamw8bit`, with
        ``param_rounding="compensated"`` if all of a named model is trained.
      card: memory of the GPU, as ``"48GiB"`` or a number of bytes; None for this machine's.
      host: host memory for moments; None for what is available here.
      rank: of LoRA adapters on all seven projections of a named model, in float32. None to train
        the whole model, in bfloat16.
      base: format of the weights below the adapters: ``"nf4"`` (the default, with a bfloat16 scale
        for 64 weights), ``"nf4-double"`` (scales are quantized too) or ``"bfloat16"``.
      batch: sequences in a step of a named model; 1 by default.
      sequence: tokens in each; 2,048 by default.
      clip: whether gradients of a named model are clipped by `optax.clip_by_global_norm`, for which
        XLA copies the largest one; True by default. `paged_optax.clip_by_global_norm` copies none.
      frozen: weights next to the trained parameters: a tree, or their size.
      compiled: the training step with `optimizer` in it, compiled for such a GPU by
        ``jax.jit(step).lower(...).compile()``, or what its ``memory_analysis()`` returned.
      activations: what XLA needs next to parameters, gradients and optimizer state, if you know it.
      context: memory of the GPU outside of XLA's pool, for CUDA and its libraries.
      link: bytes per second between host and GPU, each way while both are busy. None to measure
        it where `card` is this machine's, and else 50e9 (PCIe 5 x16).
      name: what to call the optimizer.

    Returns:
      A `Plan`. ``print(plan(...))`` says it in words; `Plan.to_dict` has the numbers.

    Raises:
      ValueError: for an unknown name, a size that cannot be read, arguments that do not belong
        together, or a compiled step that does not have these parameters.
      TypeError: for parameters of a dtype that the optimizer refuses.

    Example:
      >>> import jax, jax.numpy as jnp, paged_optax
      >>> plan = paged_optax.plan("65b", card="48GiB", host="64GiB", rank=64)
      >>> print(plan.fits, plan.other.fits)  # the other is optax.adamw
      True False

      Of your own parameters:

      >>> params = {"w": jax.ShapeDtypeStruct((32, 4096, 14336), jnp.bfloat16)}
      >>> tx = paged_optax.paged_adamw8bit(1e-5)
      >>> plan = paged_optax.plan(params, tx, card="16GiB", host="64GiB", activations="2GiB")
      >>> print(plan.fits, plan.usage.moments // 1024**2, plan.usage.on_host)
      True 3642 0

    References:
      Dettmers et al., `QLoRA <https://arxiv.org/abs/2305.14314>`_, 2023
    """
    about = _about(model, rank=rank, base=base, batch=batch, sequence=sequence, clip=clip)
    if optimizer is None:
        full = isinstance(model, str) and rank is None
        optimizer = paged_adamw8bit(1e-4, param_rounding="compensated" if full else "nearest")
        name = name or "paged_adamw8bit"
    kept = kept_by(optimizer, about.params)
    about = _with_known(about, kept, compiled, frozen, activations)
    room = Room(
        card=_own_card() if card is None else parse_bytes("card", card),
        context=parse_bytes("context", context),
        host=_ext.available_host_bytes() if host is None else parse_bytes("host", host),
        devices=devices_here(about.params),
        link=_link(link, is_own=card is None),
    )
    return Plan(
        subject=about.subject,
        card=room.card,
        host=room.host,
        context=room.context,
        frozen=about.frozen,
        params=about.param_bytes,
        gradients=about.gradients,
        link=room.link,
        usage=room.usage(about, kept, name or "the optimizer"),
        other=room.usage(about, kept_by(optax.adamw(1e-4), about.params), "optax.adamw"),
    )


def _about(model: Any, **shape: Any) -> Model:
    if isinstance(model, str):
        return named_model(model, **shape)
    if any(value is not None for value in shape.values()):
        raise ValueError(
            f"{', '.join(shape)} are for named models; for your own parameters pass frozen=, and"
            " compiled= or activations="
        )
    return given_model(model)


def _with_known(about: Model, kept: Kept, compiled: Any, frozen: Any, activations: Any) -> Model:
    """The model with what the user knows of it."""
    if compiled is not None:
        if frozen is not None or activations is not None:
            raise ValueError("a compiled step has frozen weights and activations: leave those out")
        return with_analysis(about, compiled, kept)
    if frozen is not None:
        about = dataclasses.replace(about, frozen=about.frozen + frozen_bytes(frozen))
    if activations is not None:
        about = with_temporaries(about, parse_bytes("activations", activations))
    return about


def _own_card() -> int:
    """Bytes of this machine's smallest GPU."""
    info = _ext.cuda_info()
    sizes = [gpu["total_bytes"] for gpu in info.get("devices", [])]
    if not sizes:
        raise ValueError(
            f"there is no GPU here to plan for ({info.get('error', 'none found')}); name the memory"
            " of one: card='48GiB'"
        )
    return min(sizes)


def _link(rate: float | None, is_own: bool) -> float:
    if rate is None:
        return _ext.measure_link(0, 2**28)[2] if is_own else LINK
    if not rate > 0:
        raise ValueError(f"link is {rate}; it is a rate in bytes per second, such as 50e9")
    return float(rate)
