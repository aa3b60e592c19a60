"""Weights in NF4: 4 bits each, two to a byte, and a scale for every 64 of them.

This is the format of QLoRA (https://arxiv.org/abs/2305.14314): each weight is the nearest of 16
quantiles of a normal distribution, times the largest magnitude of its block. Blocks lie along the
input dimension of a projection, as in bitsandbytes. qwix has NF4 too, but one code for each byte.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

BLOCK = 64  # weights that share a scale
GROUP = 256  # scales that share an offset and a step, if scales are quantized too
LEVELS = np.array(
    # Appendix E of the paper.
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635]
    + [-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725]
    + [0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941]
    + [0.7229568362236023, 1.0],
    np.float32,
)


class NF4(NamedTuple):
    """A stack of matrices (..., inputs, outputs); a pytree whose leading axes can be scanned."""

    codes: jax.Array  # uint8[..., inputs / 2, outputs]: rows i and i + 32 of a block share a byte
    scales: jax.Array  # bfloat16[..., inputs / 64, outputs], or uint8 if they are quantized
    steps: jax.Array | None = None  # float32[..., inputs / 64, 2, groups]: offset and step


def quantize(weights: jax.Array, double: bool = False) -> NF4:
    """Returns matrices in NF4.

    Args:
      weights: floating-point array of shape (..., inputs, outputs); 64 must divide `inputs`.
      double: whether to quantize the scales to 8 bits as well, which saves a bit for 8 weights.
    """
    *stack, inputs, outputs = weights.shape
    if inputs % BLOCK:
        raise ValueError(
            f"NF4 has a scale for {BLOCK} inputs, but a weight has {inputs} of them; keep this"
            " model in bfloat16"
        )
    blocks = weights.astype(jnp.float32).reshape(*stack, inputs // BLOCK, BLOCK, outputs)
    scales = jnp.max(jnp.abs(blocks), axis=-2)
    stored = _quantize_scales(scales) if double else (scales.astype("bfloat16"), None)
    scales = read_scales(*stored)[..., None, :]
    between = (LEVELS[1:] + LEVELS[:-1]) / 2
    scaled = blocks / jnp.where(scales == 0, 1, scales)
    codes = sum((scaled > edge).astype(jnp.uint8) for edge in between)
    low, high = jnp.split(codes, 2, axis=-2)
    return NF4((low | high << 4).reshape(*stack, inputs // 2, outputs), *stored)


def dequantize(weights: NF4, dtype: DTypeLike = "bfloat16") -> jax.Array:
    """Returns the matrices (..., inputs, outputs) that `weights` stands for."""
    *stack, half, outputs = weights.codes.shape
    pairs = weights.codes.reshape(*stack, half * 2 // BLOCK, 1, BLOCK // 2, outputs)
    codes = pairs >> np.array([0, 4], np.uint8)[:, None, None] & 15
    scales = read_scales(weights.scales, weights.steps)[..., None, None, :]
    values = jnp.asarray(LEVELS).at[codes].get(mode="promise_in_bounds") * scales
    return values.astype(dtype).reshape(*stack, half * 2, outputs)


def read_scales(scales: jax.Array, steps: jax.Array | None) -> jax.Array:
    """Returns stored scales as float32[..., inputs / 64, outputs]."""
    scales = scales.astype(jnp.float32)
    if steps is None:
        return scales
    steps = jnp.repeat(steps, scales.shape[-1] // steps.shape[-1], axis=-1)
    return steps[..., 0, :] + steps[..., 1, :] * scales


def _quantize_scales(scales: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cuts the range of each group of scales into 255 equal steps."""
    group = np.gcd(scales.shape[-1], GROUP)
    grouped = scales.reshape(*scales.shape[:-1], -1, group)
    low, high = grouped.min(-1, keepdims=True), grouped.max(-1, keepdims=True)
    step = (high - low) / 255
    codes = jnp.round((grouped - low) / jnp.where(step == 0, 1, step))
    steps = jnp.stack([low[..., 0], step[..., 0]], axis=-2)
    return codes.reshape(scales.shape).astype(jnp.uint8), steps
