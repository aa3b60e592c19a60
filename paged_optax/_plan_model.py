"""What a plan is about: parameters, frozen weights, and what XLA needs besides, as shapes."""

import dataclasses
from typing import Any

import jax

from ._bytes import parse_bytes
from ._forecast import Kept, local_shapes, num_bytes
from ._shapes import FROZEN_BYTES, Shape, find_shape
from ._validate import check_choice


@dataclasses.dataclass(frozen=True)
class Model:
    """What is trained, whatever the optimizer. Sizes are in bytes, on each device.

    Attributes:
      subject: in words.
      params: shapes of the trained parameters, with their shardings.
      frozen: weights that are not trained, and other arguments of a compiled step.
      gradients: 0 where `temporaries` have them.
      temporaries: what XLA needs besides; None if not known.
      paged_temporaries: the same with a paged optimizer.
    """

    subject: str
    params: Any
    frozen: int
    gradients: int
    temporaries: int | None = None
    paged_temporaries: int | None = None

    @property
    def param_bytes(self) -> int:
        return tree_bytes(local_shapes(self.params))


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays of a tree, from their shapes."""
    return sum(map(num_bytes, jax.tree.leaves(tree)))


def given_model(params: Any) -> Model:
    """A model of the user's own."""
    leaves = jax.tree.leaves(params)
    if not leaves or not all(hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in leaves):
        raise ValueError(
            "model is neither a name nor a tree of arrays or jax.ShapeDtypeStructs; pass the"
            " trained parameters, or what jax.eval_shape returns for the function that makes them"
        )
    count = sum(leaf.size for leaf in leaves)
    gradients = tree_bytes(local_shapes(params))
    return Model(f"{_count(count)} parameters", params, 0, gradients)


def named_model(
    name: str,
    rank: int | None,
    base: str | None,
    batch: int | None,
    sequence: int | None,
    clip: bool | None,
) -> Model:
    """A model of a published shape: adapters of this rank, or all of it."""
    shape = find_shape(name)
    for what, value in (("rank", rank), ("batch", batch), ("sequence", sequence)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{what} is {value!r}; it must be an int of at least 1")
    if rank is None and base is not None:
        raise ValueError(
            f"base is {base!r}, the format of the weights below adapters, but there is no rank;"
            " give the rank of the adapters, or leave base out to train the whole model"
        )
    base = "nf4" if base is None else base
    check_choice("base", base, tuple(FROZEN_BYTES))
    batch, sequence = 1 if batch is None else batch, 2048 if sequence is None else sequence
    params = shape.whole() if rank is None else shape.adapters(rank)
    tokens = batch * sequence
    what = "all of it in bfloat16" if rank is None else f"LoRA of rank {rank} on {base} weights"
    gradients = tree_bytes(params)
    return Model(
        f"{name.lower()}, {what}, {batch} x {sequence:,} tokens",
        params,
        0 if rank is None else shape.frozen_bytes(base),
        gradients,
        *_estimate(shape, params, tokens, clip is not False),
    )


def _estimate(shape: Shape, params: Any, tokens: int, clips: bool) -> tuple[int, int]:
    """What XLA needs besides parameters, gradients and state, without and with paged moments.

    In the backward pass of a layer there are, next to the gradients of all layers, a saved residual
    stream for each layer, the layer's weights, and what the feed-forward part or the attention
    needs (`_layer_bytes`). The gradient of the embedding comes later. A paged optimizer needs all
    clipped gradients at once, so there is a copy of the largest one, and a hole as large as the
    next smaller one; the embedding's place may then be taken.
    """
    saved, layer = 2 * shape.layers * tokens * shape.width, _layer_bytes(shape, tokens)
    later = num_bytes(params["embed"]) if "embed" in params else 0
    sizes = sorted({num_bytes(leaf) for leaf in jax.tree.leaves(params) if leaf.ndim == 3})
    backward = saved + layer - later
    return backward, max(saved + layer, sum(sizes[-2:])) if clips else backward


def _layer_bytes(shape: Shape, tokens: int) -> int:
    """Weights and activations in 16 bits during the backward pass of a layer.

    For the feed-forward part, there are a matrix more and four arrays of its width; for the
    attention, six times queries, keys and values, and nine residual streams. The counts were fitted
    to what XLA says of examples/llama.py, with fused attention.
    """
    matrices = {name: inputs * outputs for name, (inputs, outputs) in shape.projections.items()}
    feed_forward = max(matrices.values()) + 4 * tokens * shape.hidden
    width = sum(shape.projections[name][1] for name in "qkv")
    attention = (6 * width + 9 * shape.width) * tokens
    return 2 * (sum(matrices.values()) + max(feed_forward, attention))


def with_analysis(model: Model, compiled: Any, kept: Kept) -> Model:
    """The model with XLA's own numbers for a step of it, instead of estimates."""
    analyse = getattr(compiled, "memory_analysis", None)
    stats = analyse() if analyse else compiled
    if not hasattr(stats, "temp_size_in_bytes"):
        raise ValueError(
            f"compiled is a {type(compiled).__name__}; it must be what"
            " jax.jit(step).lower(...).compile() returns, or its memory_analysis()"
        )
    frozen = stats.argument_size_in_bytes - model.param_bytes - kept.in_xla
    if frozen < 0:
        raise ValueError(
            f"the compiled step has {stats.argument_size_in_bytes} bytes of arguments, less than"
            f" its parameters ({model.param_bytes}) and optimizer state ({kept.in_xla}); pass the"
            " training step of these parameters, with this optimizer in it"
        )
    outputs = stats.output_size_in_bytes - stats.alias_size_in_bytes
    model = dataclasses.replace(model, frozen=frozen, gradients=0)
    return with_temporaries(model, stats.temp_size_in_bytes + outputs)


def with_temporaries(model: Model, nbytes: int) -> Model:
    """The model with a known number in place of estimates."""
    return dataclasses.replace(model, temporaries=nbytes, paged_temporaries=nbytes)


def frozen_bytes(frozen: Any) -> int:
    """Bytes of frozen weights: of a tree of arrays, or as a size."""
    if isinstance(frozen, str | int):
        return parse_bytes("frozen", frozen)
    return tree_bytes(local_shapes(frozen))


def devices_here(params: Any) -> int:
    """How many of this host's devices have a part of the parameters."""
    here = 1
    for leaf in jax.tree.leaves(params):
        sharding = getattr(leaf, "sharding", None)
        if sharding is None:
            continue
        try:
            here = max(here, len(sharding.addressable_devices))
        except ValueError:  # of an abstract mesh: it may be all of them
            here = max(here, sharding.num_devices)
    return here


def _count(number: int) -> str:
    for size, unit in ((10**9, "billion"), (10**6, "million")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:,}"
