"""A small Llama-style language model over bytes, its loss and one training step.

The fine-tuning examples use it. It knows nothing of 8-bit moments, LoRA or several devices.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

VOCAB = 256  # one token per byte value


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the model. The defaults are those of the fine-tuning examples."""

    dim: int = 256
    layers: int = 2
    heads: int = 8
    kv_heads: int = 4
    hidden: int = 704


TINY = Config()


# ---------------------------------------------------------------------------------------- the model


def rope(x: jax.Array) -> jax.Array:
    """Rotates the two halves of every head of `x` (batch, time, heads, head_dim) by position."""
    time_steps, head_dim = x.shape[1], x.shape[-1]
    frequency = 10_000.0 ** (-jnp.arange(0, head_dim, 2) / head_dim)
    angle = jnp.arange(time_steps)[:, None, None] * frequency  # (time, 1, head_dim / 2)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


class Attention(nnx.Module):
    """Causal self-attention; `kv_heads` key/value heads serve `heads` query heads."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        linear = functools.partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.head_dim = config.dim // config.heads
        self.q_proj = linear(config.dim, config.dim)
        self.k_proj = linear(config.dim, self.head_dim * config.kv_heads)
        self.v_proj = linear(config.dim, self.head_dim * config.kv_heads)
        self.o_proj = linear(config.dim, config.dim)

    def __call__(self, x):
        q, k, v = (
            project(x).reshape(*x.shape[:2], -1, self.head_dim)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = jax.nn.dot_product_attention(rope(q), rope(k), v, is_causal=True)
        return self.o_proj(mixed.reshape(x.shape))


class SwiGLU(nnx.Module):
    def __init__(self, config: Config, rngs: nnx.Rngs):
        linear = functools.partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.gate_proj = linear(config.dim, config.hidden)
        self.up_proj = linear(config.dim, config.hidden)
        self.down_proj = linear(config.hidden, config.dim)

    def __call__(self, x):
        return self.down_proj(nnx.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nnx.Module):
    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.attention_norm = nnx.RMSNorm(config.dim, rngs=rngs)
        self.attention = Attention(config, rngs)
        self.mlp_norm = nnx.RMSNorm(config.dim, rngs=rngs)
        self.mlp = SwiGLU(config, rngs)

    def __call__(self, x):
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Llama(nnx.Module):
    """Maps token ids (batch, time) to logits (batch, time, VOCAB). `wrap` wraps every layer."""

    def __init__(
        self,
        rngs: nnx.Rngs,
        wrap: Callable[[Any], Any] = lambda layer: layer,
        config: Config = TINY,
    ):
        self.embed = wrap(nnx.Embed(VOCAB, config.dim, rngs=rngs))
        self.blocks = nnx.List([wrap(Block(config, rngs)) for _ in range(config.layers)])
        self.norm = wrap(nnx.RMSNorm(config.dim, rngs=rngs))
        self.head = wrap(nnx.Linear(config.dim, VOCAB, use_bias=False, rngs=rngs))

    def __call__(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


# -------------------------------------------------------------------------------- loss and one step


def loss_fn(model: nnx.Module, ids: jax.Array, dtype: str) -> jax.Array:
    """Returns the mean next-byte cross-entropy of `ids` (batch, time + 1), computed in `dtype`.

    The stored parameters stay float32, because bfloat16 would round small updates away.
    """

    def cast(x):  # but not the uint4 codes of NF4 weights
        return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    graphdef, state = nnx.split(model)
    logits = nnx.merge(graphdef, jax.tree.map(cast, state))(ids[:, :-1]).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()


eval_step = nnx.jit(loss_fn, static_argnames="dtype")


@nnx.jit(static_argnames="dtype", donate_argnames=("model", "optimizer"))
def train_step(model: nnx.Module, optimizer: nnx.Optimizer, ids: jax.Array, dtype: str):
    """Takes one step with the mean gradient over micro-batches `ids` (micro, batch, time + 1).

    It averages the gradients first and runs the optimizer once. `optax.MultiSteps` would run it on
    every micro-batch and discard results, which is impossible with moments that change in place.
    """
    value_and_grad = nnx.value_and_grad(loss_fn, argnums=nnx.DiffState(0, optimizer.wrt))

    def add_micro_batch(total, ids):
        step = value_and_grad(nnx.clone(model), ids, dtype)  # nnx wants a copy of this trace level
        return jax.tree.map(jnp.add, total, step), None

    zeros = jax.tree.map(jnp.zeros_like, nnx.state(model, optimizer.wrt))
    total, _ = jax.lax.scan(add_micro_batch, (jnp.zeros(()), zeros), ids)
    loss, grads = jax.tree.map(lambda x: x / len(ids), total)
    optimizer.update(model, grads)
    return loss
