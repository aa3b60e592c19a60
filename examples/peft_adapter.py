"""Writes LoRA adapters in PEFT's format, and reads them.

`PeftModel.from_pretrained(base, folder)` of the `peft` package loads what `save` writes.
"""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from hf_checkpoint import CheckpointError, read_json, tensor_name
from llama import Arrays, Config
from safetensors.numpy import load_file, save_file

MODEL = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
SIDES = {"a": "lora_A", "b": "lora_B"}


def _key(name: str, layer: int, side: str) -> str:
    module = tensor_name(name, layer).removesuffix(".weight")
    return f"base_model.model.{module}.{SIDES[side]}.weight"


def save(folder: str | Path, lora: Arrays, alpha: float, base: str) -> None:
    """Saves `lora` as a folder. `base` names the model that it belongs to, for people and PEFT.

    Args:
      folder: folder to make; files of an adapter in it are replaced.
      lora: adapters as in `llama.py`.
      alpha: PEFT multiplies what an adapter adds by alpha / rank.
      base: path or name of the base model.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        _key(name, layer, side): np.ascontiguousarray(matrix.T)
        for name, sides in lora.items()
        for side, stack in sides.items()
        for layer, matrix in enumerate(np.asarray(stack, np.float32))
    }
    save_file(tensors, folder / MODEL, metadata={"format": "pt"})
    rank = next(iter(lora.values()))["a"].shape[-1]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(lora),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def load(folder: str | Path, config: Config) -> tuple[Arrays, float]:
    """Returns the adapters of a folder and their alpha.

    Raises:
      CheckpointError: the adapter is of another kind, or of another model.
    """
    folder = Path(folder)
    adapter = read_json(folder / CONFIG)
    plain = adapter.get("peft_type") == "LORA" and adapter.get("bias", "none") == "none"
    if not plain or adapter.get("use_dora") or adapter.get("use_rslora"):
        raise CheckpointError(f"'{folder}' is not a plain LoRA adapter without biases")
    tensors = load_file(folder / MODEL)
    lora = {}
    try:
        for name in adapter["target_modules"]:
            lora[name] = {
                side: jnp.stack(
                    [tensors.pop(_key(name, layer, side)).T for layer in range(config.layers)]
                ).astype(jnp.float32)
                for side in SIDES
            }
            shapes = lora[name]["a"].shape[1], lora[name]["b"].shape[-1]
            if shapes != config.shapes()[name]:
                raise CheckpointError(
                    f"{name} of '{folder}' is {shapes} and not {config.shapes()[name]}: was the"
                    " adapter made for this model?"
                )
    except KeyError as error:
        raise CheckpointError(f"'{folder}' has no {error}; was it made for this model?") from None
    if tensors:
        raise CheckpointError(f"'{folder}' also has {sorted(tensors)[0]}, which is not supported")
    return lora, float(adapter["lora_alpha"])
