"""Published sizes of language models, and what training one of such a shape takes."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

NF4_BLOCK = 64  # weights of NF4 that share a scale
# Bytes of a frozen weight: 4 bits and a bfloat16 scale a block; 4 bits, an 8-bit scale a block and
# two float32 for each 256 of those (QLoRA's double quantization); 16 bits.
FROZEN_BYTES = {
    "nf4": 0.5 + 2 / NF4_BLOCK,
    "nf4-double": 0.5 + 1 / NF4_BLOCK + 8 / (256 * NF4_BLOCK),
    "bfloat16": 2.0,
}


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a model of the Llama family, without tied embeddings.

    Attributes:
      width: of the residual stream.
      hidden: of a feed-forward layer.
      layers: how many there are.
      heads, kv_heads: for queries; for keys and values.
      vocab: number of tokens.
      head_dim: of all heads.
      source: where the sizes are published.
      qkv_bias: whether the first three matrices of a layer have biases.
    """

    width: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    source: str
    head_dim: int = 128
    qkv_bias: bool = False

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of a layer's seven matrices."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q": (self.width, queries),
            "k": (self.width, keys),
            "v": (self.width, keys),
            "o": (queries, self.width),
            "gate": (self.width, self.hidden),
            "up": (self.width, self.hidden),
            "down": (self.hidden, self.width),
        }

    @property
    def layer_weights(self) -> int:
        """Number of weights of a layer's matrices."""
        return sum(inputs * outputs for inputs, outputs in self.projections.values())

    def whole(self) -> Any:
        """All parameters in bfloat16, layers stacked."""
        matrices = {name: (self.layers, *sizes) for name, sizes in self.projections.items()}
        return _arrays(matrices | self._rest(), jnp.bfloat16)

    def _rest(self) -> dict[str, tuple[int, ...]]:
        """What is not a projection, and so is never in NF4."""
        biased = ("q", "k", "v") if self.qkv_bias else ()
        biases = {f"{name}_bias": (self.layers, self.projections[name][1]) for name in biased}
        return biases | {
            "embed": (self.vocab, self.width),
            "head": (self.width, self.vocab),
            "norm": (self.width,),
            "attention_norms": (self.layers, self.width),
            "mlp_norms": (self.layers, self.width),
        }

    def adapters(self, rank: int) -> Any:
        """LoRA of all seven matrices in float32, layers stacked."""
        shapes = {}
        for name, (inputs, outputs) in self.projections.items():
            shapes[name + "_a"] = (self.layers, inputs, rank)
            shapes[name + "_b"] = (self.layers, rank, outputs)
        return _arrays(shapes, jnp.float32)

    def frozen_bytes(self, base: str) -> int:
        """Bytes of the weights under adapters: matrices as `base` says, the rest in bfloat16."""
        rest = sum(math.prod(shape) for shape in self._rest().values())
        return round(self.layers * self.layer_weights * FROZEN_BYTES[base]) + 2 * rest


def _arrays(shapes: dict[str, tuple[int, ...]], dtype: Any) -> Any:
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in shapes.items()}


_LLAMA = "Touvron et al., LLaMA, arXiv:2302.13971, table 2, and the released configurations"
SHAPES = {
    "7b": Shape(4096, 11008, 32, 32, 32, 32_000, _LLAMA),
    "8b": Shape(4096, 14336, 32, 32, 8, 128_256, "The Llama 3 Herd, arXiv:2407.21783, table 3"),
    "13b": Shape(5120, 13824, 40, 40, 40, 32_000, _LLAMA),
    "24b": Shape(5120, 32768, 40, 32, 8, 131_072, "Mistral Small 3 (2501), config.json"),
    "32b": Shape(
        5120, 27648, 64, 40, 8, 152_064, "Qwen2.5 report, arXiv:2412.15115", qkv_bias=True
    ),
    "33b": Shape(6656, 17920, 60, 52, 52, 32_000, _LLAMA),
    "65b": Shape(8192, 22016, 80, 64, 64, 32_000, _LLAMA),
    "70b": Shape(8192, 28672, 80, 64, 8, 32_000, "Touvron et al., Llama 2, arXiv:2307.09288"),
}


def find_shape(name: str) -> Shape:
    """The shape of a name, whatever its case."""
    if name.lower() not in SHAPES:
        raise ValueError(
            f"unknown model {name!r}; there are {', '.join(SHAPES)}. For another one pass its"
            " parameters, as arrays or jax.ShapeDtypeStructs."
        )
    return SHAPES[name.lower()]
