"""Language models of the Llama family: Llama 2 and 3, Mistral, Qwen 2.5 and 3, SmolLM2.

A model is a `Config` and a dict of arrays. Each array of a layer is stacked over the layers, so one
layer's code is compiled for all of them (`jax.lax.scan`), and the backward pass computes a layer
again (`jax.checkpoint`). Projections are plain arrays or NF4 (`nf4.py`), with LoRA adapters or
without. `hf_checkpoint.py` reads a checkpoint of Hugging Face.

    base = {"embed": (vocab, dim), "norm": (dim,), "head": (dim, vocab) unless tied,
            "layers": {"attention_norm": (layers, dim), "q_proj": (layers, dim, heads * head_dim),
                       "q_bias": (layers, heads * head_dim) if the config says so, ...}}
    lora = {"q_proj": {"a": (layers, dim, rank), "b": (layers, rank, heads * head_dim)}, ...}
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from nf4 import BLOCK, NF4, dequantize

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LOSS_CHUNK = 1024  # tokens whose logits exist at a time
Arrays = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and variants of a model. The defaults are Llama's."""

    vocab: int
    dim: int
    layers: int
    heads: int
    kv_heads: int
    hidden: int
    head_dim: int
    rope_theta: float = 10_000.0
    rope_factor: float = 1.0  # by how much heads turn slower ("linear"), or
    rope_bands: tuple[float, float, float] | None = None  # "llama3": low, high, original length
    norm_eps: float = 1e-5
    tied: bool = False  # the embedding is the head too
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    window: int | None = None  # tokens that a token attends to, itself included

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Returns (inputs, outputs) of the projections of a layer."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (self.dim, q),
            "k_proj": (self.dim, kv),
            "v_proj": (self.dim, kv),
            "o_proj": (q, self.dim),
            "gate_proj": (self.dim, self.hidden),
            "up_proj": (self.dim, self.hidden),
            "down_proj": (self.hidden, self.dim),
        }

    def vectors(self) -> dict[str, int]:
        """Returns the sizes of a layer's norms and biases."""
        sizes = {"attention_norm": self.dim, "mlp_norm": self.dim}
        if self.qk_norm:
            sizes |= {"q_norm": self.head_dim, "k_norm": self.head_dim}
        biased = ("q", "k", "v") * self.qkv_bias + ("o",) * self.o_bias
        biased += ("gate", "up", "down") * self.mlp_bias
        return sizes | {f"{name}_bias": self.shapes()[f"{name}_proj"][1] for name in biased}


# Models whose shapes are named in papers. Weights of them can be made at random (`random_base`).
SHAPES = {
    "tiny": Config(512, 128, 2, 4, 2, 256, 32),
    "7b": Config(32_000, 4096, 32, 32, 32, 11_008, 128),
    "8b": Config(128_256, 4096, 32, 32, 8, 14_336, 128, 500_000.0),
    "13b": Config(32_000, 5120, 40, 40, 40, 13_824, 128),
    "24b": Config(131_072, 5120, 40, 32, 8, 32_768, 128, 100_000_000.0),
    "32b": Config(152_064, 5120, 64, 40, 8, 27_648, 128, 1_000_000.0, norm_eps=1e-6, qkv_bias=True),
    "33b": Config(32_000, 6656, 60, 52, 52, 17_920, 128),
    "65b": Config(32_000, 8192, 80, 64, 64, 22_016, 128),
}


# ------------------------------------------------------------------------------------ the model


class Cache(NamedTuple):
    """Keys and values of the tokens so far, for sampling."""

    keys: jax.Array  # (layers, batch, length, kv_heads, head_dim)
    values: jax.Array
    used: jax.Array  # int32[]: tokens in it


def rope_frequencies(config: Config) -> np.ndarray:
    """Returns the radians by which each pair of a head turns from one token to the next."""
    half = np.arange(0, config.head_dim, 2) / config.head_dim
    frequency = 1.0 / config.rope_theta**half
    kept = 0.0
    if config.rope_bands is not None:  # slow pairs turn slower, fast ones as before, by turns
        low, high, length = config.rope_bands
        kept = np.clip((length * frequency / (2 * np.pi) - low) / (high - low), 0, 1)
    return frequency * (kept + (1 - kept) / config.rope_factor)


def rope(x: jax.Array, positions: jax.Array, config: Config) -> jax.Array:
    """Turns the two halves of every head of `x` (batch, time, heads, head_dim) by position."""
    frequencies = jnp.asarray(rope_frequencies(config), jnp.float32)
    angle = positions.astype(jnp.float32)[:, None, None] * frequencies  # (time, 1, head_dim / 2)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def rms_norm(x: jax.Array, weight: jax.Array, config: Config) -> jax.Array:
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + config.norm_eps)
    return (x32 * scale).astype(x.dtype) * weight.astype(x.dtype)


def project(x: jax.Array, name: str, layer: Arrays, lora: Arrays, scale: float) -> jax.Array:
    """Returns x W + bias + scale (x A) B."""
    weight = layer[name]
    y = x @ (dequantize(weight, x.dtype) if isinstance(weight, NF4) else weight.astype(x.dtype))
    bias = layer.get(name.replace("proj", "bias"))
    if bias is not None:
        y += bias.astype(x.dtype)
    if name in lora:
        y += x @ lora[name]["a"].astype(x.dtype) @ lora[name]["b"].astype(x.dtype) * scale
    return y


def attend(q, k, v, config: Config, past: jax.Array | None) -> jax.Array:
    """Causal attention of the last `q.shape[1]` of the tokens in `k` and `v`.

    `past` is how many tokens came before `q`, or None where `q` has all tokens.
    """
    if past is not None:
        i = past + jnp.arange(q.shape[1])[:, None]
        j = jnp.arange(k.shape[1])
        mask = (j <= i) & (j > i - (config.window or k.shape[1]))
        return jax.nn.dot_product_attention(q, k, v, mask=mask)
    window = None
    if config.window is not None and config.window < k.shape[1]:
        window = (config.window - 1, 0)
    flash = jax.default_backend() == "gpu" and q.dtype == jnp.bfloat16
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        is_causal=True,
        local_window_size=window,
        implementation="cudnn" if flash else None,
    )


def run_layer(x, layer: Arrays, lora: Arrays, config: Config, scale: float, kv, past: Any):
    """Returns `x` (batch, time, dim) after a layer, and the keys and values if it got some."""
    linear = functools.partial(project, layer=layer, lora=lora, scale=scale)
    put = jax.lax.dynamic_update_slice_in_dim
    positions = (0 if past is None else past) + jnp.arange(x.shape[1])

    h = rms_norm(x, layer["attention_norm"], config)
    q, k, v = (
        linear(h, name).reshape(*h.shape[:2], -1, config.head_dim)
        for name in ("q_proj", "k_proj", "v_proj")
    )
    if config.qk_norm:
        q, k = rms_norm(q, layer["q_norm"], config), rms_norm(k, layer["k_norm"], config)
    q, k = rope(q, positions, config), rope(k, positions, config)
    if past is not None:
        kv = jax.tree.map(lambda old, new: put(old, new, past, axis=1), kv, (k, v))
        k, v = kv
    mixed = attend(q, k, v, config, past)
    x = x + linear(mixed.reshape(*x.shape[:2], -1), "o_proj")

    h = rms_norm(x, layer["mlp_norm"], config)
    return x + linear(jax.nn.silu(linear(h, "gate_proj")) * linear(h, "up_proj"), "down_proj"), kv


def identity(x):
    return x


def hidden(
    base, lora, ids, config: Config, scale=1.0, dtype="bfloat16", cache=None, whole=identity
):
    """Returns what the head sees, (batch, time, dim), and the cache with these tokens in it.

    Where a device has a part of each array, `whole` makes arrays whole. It is called for what is
    used next, so that no device ever has all of the model.
    """
    past = None if cache is None else cache.used

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def step(x, stacks):
        layer, adapters, kv = stacks
        return run_layer(x, whole(layer), whole(adapters), config, scale, kv, past)

    x = whole(base["embed"]).astype(dtype)[ids]
    kv = None if cache is None else (cache.keys, cache.values)
    x, kv = jax.lax.scan(step, x, (base["layers"], lora, kv))
    if cache is not None:
        cache = Cache(kv[0], kv[1], cache.used + ids.shape[1])
    return rms_norm(x, whole(base["norm"]), config), cache


def words_of(base: Arrays) -> Arrays:
    """Returns the part of the model that `head` needs."""
    name = "head" if "head" in base else "embed"
    return {name: base[name]}


def head(base: Arrays, x: jax.Array) -> jax.Array:
    """Returns float32 logits."""
    weight = base["head"] if "head" in base else base["embed"].T
    return jnp.matmul(x, weight.astype(x.dtype), preferred_element_type=jnp.float32)


def logits(base, lora, ids, config: Config, scale=1.0, dtype="bfloat16") -> jax.Array:
    """Returns float32 logits (batch, time, vocab) of the tokens after `ids` (batch, time)."""
    return head(base, hidden(base, lora, ids, config, scale, dtype)[0])


# ------------------------------------------------------------------------------------- the loss


def loss_sum(
    base, lora, ids, weights, config: Config, scale=1.0, dtype="bfloat16", whole=identity
) -> jax.Array:
    """Returns the sum of weighted cross-entropies of `ids` (batch, time + 1), in nats.

    `weights` (batch, time) belong to `ids[:, 1:]`. Logits are made for a chunk of tokens at a time
    and made again in the backward pass, because with large vocabularies they would take more memory
    than the layers. For `whole` see `hidden`.
    """
    x, _ = hidden(base, lora, ids[:, :-1], config, scale, dtype, whole=whole)
    words = whole(words_of(base))
    batch, time = weights.shape
    chunks = -(-time * batch // LOSS_CHUNK)
    pad = -time % chunks

    def cut(y):  # (batch, time, ...) into (chunks, batch, time / chunks, ...)
        y = jnp.pad(y, [(0, 0), (0, pad)] + [(0, 0)] * (y.ndim - 2))
        return jnp.moveaxis(y.reshape(batch, chunks, -1, *y.shape[2:]), 1, 0)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def chunk_loss(chunk):
        x, labels, weights = chunk
        scores = head(words, x)
        right = jnp.take_along_axis(scores, labels[..., None], axis=-1)[..., 0]
        return ((jax.nn.logsumexp(scores, axis=-1) - right) * weights).sum()

    chunked = tuple(map(cut, (x, ids[:, 1:], weights)))
    return jax.lax.map(chunk_loss, chunked).sum()


# ---------------------------------------------------------------------------------- new weights


def init_lora(key, config: Config, rank: int, names: Sequence[str] = PROJECTIONS) -> Arrays:
    """Returns float32 adapters that change nothing yet: A as in PEFT, B zero."""
    lora = {}
    for name, subkey in zip(names, jax.random.split(key, len(names)), strict=True):
        inputs, outputs = config.shapes()[name]
        bound = inputs**-0.5
        a = jax.random.uniform(subkey, (config.layers, inputs, rank), minval=-bound, maxval=bound)
        lora[name] = {"a": a, "b": jnp.zeros((config.layers, rank, outputs))}
    return lora


def random_base(key, config: Config, quantized: bool, dtype="bfloat16") -> Arrays:
    """Returns weights of the scale that trained ones have, for tests and measurements.

    With `quantized`, projections are made as random NF4 codes, so no 16-bit copy ever exists.
    Arrays are made layer by layer, because the bits of all layers at once would take more memory.
    """
    keys = iter(jax.random.split(key, len(PROJECTIONS) + 2))

    def matrix(key, inputs, outputs):
        scale = jnp.asarray(inputs**-0.5, dtype)
        return jax.random.normal(key, (inputs, outputs), dtype) * scale

    def codes(key, inputs, outputs):
        return jax.random.bits(key, (inputs // 2, outputs), "uint8")

    layers: Arrays = {
        name: (jnp.zeros if name.endswith("bias") else jnp.ones)((config.layers, size), dtype)
        for name, size in config.vectors().items()
    }
    for name, (inputs, outputs) in config.shapes().items():
        make = functools.partial(codes if quantized else matrix, inputs=inputs, outputs=outputs)
        stack = jax.lax.map(make, jax.random.split(next(keys), config.layers))
        scales = jnp.full((config.layers, inputs // BLOCK, outputs), inputs**-0.5, dtype)
        layers[name] = NF4(stack, scales) if quantized else stack
    base = {
        "embed": jax.random.normal(next(keys), (config.vocab, config.dim), dtype),
        "norm": jnp.ones(config.dim, dtype),
        "layers": layers,
    }
    return base if config.tied else base | {"head": matrix(next(keys), config.dim, config.vocab)}


# ------------------------------------------------------------------------------------- sampling


STATIC = ("config", "scale", "dtype", "length", "temperature", "whole")


@functools.partial(jax.jit, static_argnames=STATIC)
def sample(
    base, lora, prompt, key, stop, *, config, scale, dtype, length, temperature=0.0, whole=identity
):
    """Continues `prompt` (1, time) by at most `length` tokens; returns them, `stop` at the end.

    After one of the token ids `stop`, all tokens are `stop[0]`. Temperature 0 takes the likeliest.
    For `whole` see `hidden`.
    """
    size = prompt.shape[1] + length
    shape = (config.layers, 1, size, config.kv_heads, config.head_dim)
    empty = Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((), jnp.int32))

    words = whole(words_of(base))

    def choose(x, key):
        scores = head(words, x[:, -1])
        if temperature == 0:
            return jnp.argmax(scores, axis=-1)
        return jax.random.categorical(key, scores / temperature, axis=-1)

    def step(state, key):
        token, ended, cache = state
        ended |= jnp.isin(token, stop)
        x, cache = hidden(base, lora, token[:, None], config, scale, dtype, cache, whole)
        return (jnp.where(ended, stop[0], choose(x, key)), ended, cache), token

    keys = jax.random.split(key, length - 1)
    x, cache = hidden(base, lora, prompt, config, scale, dtype, empty, whole)
    start = (choose(x, key), jnp.zeros(1, bool), cache)
    last, tokens = jax.lax.scan(step, start, keys)
    return jnp.append(tokens, last[0])
