"""Training in shards (FSDP), for the benchmarks of several GPUs: two programs and their data.

Every device keeps an equal part of each array of the model, of its gradient, and of its moments,
and works on an equal part of the batch. A layer is gathered while it runs, and once more in the
backward pass. The gradients of a gather are summed over the devices and come back as shards.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import llama  # noqa: E402  # pyright: ignore[reportMissingImports]
import sharding  # noqa: E402  # pyright: ignore[reportMissingImports]

from paged_optax import apply_gradients  # noqa: E402

RANK = 64  # of the adapters of QLoRA
SHAPES = llama.SHAPES | {
    "tiny": llama.Config(512, 256, 2, 4, 2, 512, 64),
    "100m": llama.Config(512, 768, 12, 12, 4, 2048, 64),
}
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
make_mesh = sharding.make_mesh


def make_weights(config: llama.Config, method: str) -> tuple[Any, Any]:
    """Returns (frozen, trained): NF4 weights and adapters for "qlora", all weights for "full"."""
    base = llama.random_base(jax.random.key(0), config, method == "qlora")
    if method == "full":
        return {}, base
    return base, llama.init_lora(jax.random.key(1), config, RANK)


@dataclasses.dataclass
class Training:
    """A model, its optimizer state, and the two programs of a step.

    Attributes:
      frozen, trained, state: arrays in shards, and the optimizer state.
      grad: (frozen, trained, ids) to (loss, gradients), compiled.
      update: (trained, state, gradients) to (trained, state), compiled. It takes over the first
        two.
    """

    frozen: Any
    trained: Any
    state: Any
    grad: Callable
    update: Callable

    def step(self, ids: jax.Array) -> jax.Array:
        """Queues a step; returns its loss."""
        loss, grads = self.grad(self.frozen, self.trained, ids)
        self.trained, self.state = self.update(self.trained, self.state, grads)
        return loss


def begin(
    config: llama.Config, method: str, tx: optax.GradientTransformation, ids: jax.Array, paged: bool
) -> Training:
    """Makes random weights on the mesh that is set, and compiles the programs for `ids`."""
    frozen, trained = sharding.make(functools.partial(make_weights, config, method))
    state = jax.jit(tx.init)(trained)

    def loss_sum(base, lora, ids, whole):
        ones = jnp.ones((ids.shape[0], ids.shape[1] - 1))
        return llama.loss_sum(base, lora, ids, ones, config, whole=whole)

    def loss(frozen, trained, ids):
        base, lora = (frozen, trained) if method == "qlora" else (trained, {})
        return sharding.run(loss_sum, base, lora, ids, add=True) / ids[:, 1:].size

    grad = jax.jit(jax.value_and_grad(loss, argnums=1)).lower(frozen, trained, ids).compile()

    # A paged optimizer writes the new parameters itself. The updates of optax.adamw are never in
    # memory either: the compiler joins them with their application.
    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(trained, state, grads):
        if paged:
            return apply_gradients(tx, grads, state, trained)
        updates, state = tx.update(grads, state, trained)
        return optax.apply_updates(trained, updates), state

    compiled = update.lower(trained, state, trained).compile()
    found = [name for name in COLLECTIVES if name in (compiled.as_text() or "")]
    if paged and found:
        raise SystemExit(f"the compiled update has collectives: {', '.join(found)}")
    return Training(frozen, trained, state, grad, compiled)


def batches(batch: int, length: int) -> Iterator[jax.Array]:
    """Yields ids (batch, length + 1) of Python's documentation, the same on every mesh."""
    text = np.frombuffer("".join(topics.values()).encode(), np.uint8).astype(np.int32)
    rng = np.random.default_rng(0)
    while True:
        starts = rng.integers(len(text) - length - 1, size=batch)
        ids = text[starts[:, None] + np.arange(length + 1)]
        yield sharding.share(ids, axis=0)
