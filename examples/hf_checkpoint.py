"""Reads a checkpoint of Hugging Face into the arrays of `llama.py`.

A checkpoint is a folder with `config.json`, one `model.safetensors` or several with an index, and
`tokenizer.json`. Names, shapes and types of all tensors are checked before any is read. Tensors are
then read one by one from the mapped file, put on the device, quantized there, and written into
their stack, so neither the host nor the device ever holds more than one 16-bit tensor besides what
stays. With a mesh (`sharding.py`) each device quantizes its part of a tensor, and each process
reads the parts of its devices only.
"""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import sharding
from llama import PROJECTIONS, Arrays, Config
from nf4 import quantize
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

FAMILY = {"llama", "mistral", "qwen2", "qwen3"}
DTYPES = {"BF16", "F16", "F32"}
PARTS = {"q": "self_attn", "k": "self_attn", "v": "self_attn", "o": "self_attn"}
NORMS = {
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
}


class CheckpointError(ValueError):
    """A checkpoint that cannot be used, and why."""


# ----------------------------------------------------------------------------------- the config


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(
            f"there is no {path.name} in '{path.parent}'; give the folder of a Hugging Face"
            " checkpoint"
        ) from None
    except ValueError as error:
        raise CheckpointError(f"'{path}' is not JSON ({error}); copy it again") from None


def read_config(folder: str | Path) -> Config:
    """Returns the `Config` that `config.json` describes, or raises what is not supported."""
    path = Path(folder) / "config.json"
    hf = read_json(path)
    family = hf.get("model_type")
    if family not in FAMILY:
        raise CheckpointError(
            f"'{path}' describes a {family!r} model; these examples read {sorted(FAMILY)}"
        )
    try:
        return _config(hf, family)
    except KeyError as error:
        raise CheckpointError(f"'{path}' has no {error}; copy it again") from None


def _config(hf: dict[str, Any], family: str) -> Config:
    if "quantization_config" in hf:
        raise CheckpointError(
            "this checkpoint is quantized already; give the 16-bit one, which is quantized here"
        )
    if hf.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"the activation is {hf['hidden_act']!r}; only 'silu' is supported")
    heads, dim = hf["num_attention_heads"], hf["hidden_size"]
    bias = bool(hf.get("attention_bias", False)) and family in ("llama", "qwen3")
    return Config(
        vocab=hf["vocab_size"],
        dim=dim,
        layers=hf["num_hidden_layers"],
        heads=heads,
        kv_heads=hf.get("num_key_value_heads") or heads,
        hidden=hf["intermediate_size"],
        head_dim=hf.get("head_dim") or dim // heads,
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        tied=bool(hf.get("tie_word_embeddings", False)),
        qkv_bias=bias or family == "qwen2",
        o_bias=bias,
        mlp_bias=bool(hf.get("mlp_bias", False)) and family == "llama",
        qk_norm=family == "qwen3",
        window=_window(hf, family),
        **_rope(hf),
    )


def _window(hf: dict[str, Any], family: str) -> int | None:
    """Returns the sliding window, where all layers have one (Mistral) or none."""
    if family == "mistral":
        return hf.get("sliding_window")
    if family != "llama" and hf.get("use_sliding_window") and hf.get("sliding_window"):
        raise CheckpointError(
            "only some layers of this model have a sliding window, which is not supported; set"
            ' "use_sliding_window": false in config.json if your texts are shorter than the window'
        )
    return None


def _rope(hf: dict[str, Any]) -> dict[str, Any]:
    """Returns the options of `Config` for rotary embeddings (`rope_parameters` is newer)."""
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    theta = float(rope.get("rope_theta", hf.get("rope_theta", 10_000.0)))
    kind = rope.get("rope_type", rope.get("type", "default"))
    options: dict[str, Any] = {"rope_theta": theta}
    if kind in ("linear", "llama3"):
        options["rope_factor"] = float(rope["factor"])
    elif kind != "default":
        raise CheckpointError(
            f"rotary embeddings are scaled by {kind!r}; supported are linear and llama3. For texts"
            " within the length that the model was trained on, remove the scaling from config.json"
        )
    if kind == "llama3":
        length = rope["original_max_position_embeddings"]
        options["rope_bands"] = (rope["low_freq_factor"], rope["high_freq_factor"], length)
    return options


# ---------------------------------------------------------------------------------- the tensors


def tensor_name(name: str, layer: int) -> str:
    """Returns Hugging Face's name of an array of a layer."""
    if name in NORMS:
        return f"model.layers.{layer}.{NORMS[name]}.weight"
    projection, kind = name.split("_")
    part = PARTS.get(projection, "mlp")
    end = "bias" if kind == "bias" else "weight"
    return f"model.layers.{layer}.{part}.{projection}_proj.{end}"


def expected_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each tensor of a checkpoint; projections are (outputs, inputs)."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab, config.dim),
        "model.norm.weight": (config.dim,),
    }
    if not config.tied:
        shapes["lm_head.weight"] = (config.vocab, config.dim)
    for layer in range(config.layers):
        for name, (inputs, outputs) in config.shapes().items():
            shapes[tensor_name(name, layer)] = (outputs, inputs)
        for name, size in config.vectors().items():
            shapes[tensor_name(name, layer)] = (size,)
    return shapes


def _files(folder: Path) -> list[Path]:
    """Returns the files that hold the tensors."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return [folder / name for name in sorted(set(read_json(index)["weight_map"].values()))]
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    raise CheckpointError(
        f"'{folder}' has neither model.safetensors nor model.safetensors.index.json; convert other"
        " formats with transformers: save_pretrained(folder)"
    )


def find_tensors(folder: Path, config: Config) -> dict[str, Path]:
    """Returns the file of each tensor, after a check of all names, shapes and types."""
    where: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for path in _files(folder):
        try:
            with safe_open(path, framework="numpy") as file:
                for name in file.keys():
                    part = file.get_slice(name)
                    where[name], shapes[name] = path, tuple(part.get_shape())
                    if part.get_dtype() not in DTYPES:
                        raise CheckpointError(
                            f"{name} in '{path}' is {part.get_dtype()}; give a checkpoint in"
                            f" {', '.join(sorted(DTYPES))}"
                        )
        except FileNotFoundError:
            raise CheckpointError(f"'{path}' is missing; copy all files of the index") from None
        except SafetensorError as error:
            raise CheckpointError(f"'{path}' is damaged ({error}); copy it again") from None
    expected = expected_shapes(config)
    wrong = [f"no {name}" for name in expected if name not in shapes]
    wrong += [
        f"{name} is {shapes[name]} and not {shape}"
        for name, shape in expected.items()
        if shapes.get(name, shape) != shape
    ]
    # Computed anyway, or a copy of the embedding: some checkpoints store these as well.
    spare = ("rotary_emb.inv_freq", "lm_head.weight" if config.tied else "rotary_emb.inv_freq")
    wrong += [f"an unknown {x}" for x in shapes if x not in expected and not x.endswith(spare)]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise CheckpointError(
            f"the tensors in '{folder}' do not fit its config.json: {'; '.join(wrong[:5])}{more}."
            " Is a file from another model?"
        )
    return where


# ---------------------------------------------------------------------------------- the loading


@functools.partial(jax.jit, static_argnames="kind", donate_argnames="stack")
def _place(stack, tensor, layer, kind: str):
    """Writes a tensor into its stack, as NF4 if `kind` is "nf4" or "nf4-double"."""

    def place(stack, tensor, layer):
        x = tensor.T if tensor.ndim == 2 else tensor
        if kind.startswith("nf4"):
            x = quantize(x, double=kind == "nf4-double")
        put = jax.lax.dynamic_update_index_in_dim
        return jax.tree.map(lambda old, new: put(old, new.astype(old.dtype), layer, 0), stack, x)

    return sharding.on_parts(place, stack, tensor, layer)


def load(
    folder: str | Path, kind: str = "nf4", dtype: str = "bfloat16", show_progress: bool = True
) -> tuple[Config, Arrays]:
    """Returns the config and the arrays of a checkpoint.

    Args:
      folder: folder of the checkpoint.
      kind: how to store projections: "nf4", "nf4-double" (scales in 8 bits too), or "plain".
      dtype: of everything that is not NF4.
      show_progress: whether to show a bar.

    Raises:
      CheckpointError: files are missing or damaged, or the model is not supported.
    """
    folder = Path(folder)
    config = read_config(folder)
    where = find_tensors(folder, config)

    def read(name: str, axis: int | None) -> Any:
        """Reads a tensor; where there is a mesh, its devices share this axis."""
        # A file is opened for each tensor, so that no page of it stays mapped.
        with safe_open(where[name], framework="numpy") as file:
            if jax.sharding.get_mesh().empty:
                return file.get_tensor(name)
            part = file.get_slice(name)
            return sharding.put(part.__getitem__, tuple(part.get_shape()), axis)

    def single(name: str) -> jax.Array:
        axis = sharding.axis_for(jax.ShapeDtypeStruct(expected[name], dtype), rows=0)
        return jnp.asarray(read(name, axis), dtype)

    def stack(name: str):
        kind_here = kind if name in PROJECTIONS else "plain"
        shape = config.shapes()[name] if name in PROJECTIONS else (config.vectors()[name],)
        one = jax.ShapeDtypeStruct(shape, dtype)
        if kind_here != "plain":
            one = jax.eval_shape(functools.partial(quantize, double=kind == "nf4-double"), one)

        def zeros(x):
            return jnp.zeros((config.layers, *x.shape), x.dtype)

        stacked = sharding.make(lambda: {name: jax.tree.map(zeros, one)})[name]
        axis = sharding.axis_for(stacked, rows=1)
        if axis is not None:  # the file has matrices as (outputs, inputs)
            axis = len(shape) - 1 if axis == 1 else 0
        for layer in range(config.layers):
            stacked = _place(stacked, read(tensor_name(name, layer), axis), layer, kind_here)
            # Without this the host would read ahead of the device, and keep what it has read.
            jax.block_until_ready(stacked)
        return stacked

    expected = expected_shapes(config)
    names = [*config.vectors(), *PROJECTIONS]
    silent = not show_progress or jax.process_index() > 0
    bar = tqdm(names, desc="load", unit="stack", disable=silent)
    base = {
        "embed": single("model.embed_tokens.weight"),
        "norm": single("model.norm.weight"),
        "layers": {name: stack(name) for name in bar},
    }
    if not config.tied:
        base["head"] = single("lm_head.weight").T  # the host makes no copy
    return config, base
