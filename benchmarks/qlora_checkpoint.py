"""What `examples/qlora.py` takes with a checkpoint from a disk: while it loads, and in training.

It writes a checkpoint of Hugging Face's format with random weights of a named shape, unless the
folder has one, and a small tokenizer. `examples/qlora.py` then quantizes it layer by layer and
trains adapters on Python's help texts. The table compares what host and GPU held while loading with
the size of the 16-bit model, which neither may hold. The held-out loss must fall.

    python benchmarks/qlora_checkpoint.py /tmp/checkpoint             # 16 GB on disk, and a GPU
    python benchmarks/qlora_checkpoint.py /tmp/small --shape tiny     # what a CPU can do
    python benchmarks/qlora_checkpoint.py /tmp/checkpoint --write     # only writes it

Needs `pip install '.[qlora]'`. Other options go to `examples/qlora.py`.
"""

import argparse
import dataclasses
import functools
import json
import math
import sys
import threading
import time
from pathlib import Path
from pydoc_data.topics import topics

import jax
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import hf_checkpoint  # noqa: E402  # pyright: ignore[reportMissingImports]
import llama  # noqa: E402  # pyright: ignore[reportMissingImports]
import qlora  # noqa: E402  # pyright: ignore[reportMissingImports]

GIB = 2**30
SHARD = 2 * GIB  # bytes of a file
POOL = 2**22 - 3  # random numbers that tensors repeat; a prime, so that rows differ
OPTIONS = (
    "--devices 1 --steps 15 --warmup 2 --seq-len 1024 --accumulate 2 --rank 64 --lr 1e-3"
    " --log-every 5"
)


# ------------------------------------------------------------------------------- the checkpoint


def write(folder: Path, config: llama.Config) -> None:
    """Writes config, weights and tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    hf = {
        "model_type": "llama",
        "vocab_size": config.vocab,
        "hidden_size": config.dim,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.hidden,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
    }
    write_tokenizer(folder, min(4096, config.vocab))
    write_tensors(folder, hf_checkpoint.expected_shapes(config))
    (folder / "config.json").write_text(json.dumps(hf))


def write_tensors(folder: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Writes files of about 2 GiB, and their index."""
    files: list[dict[str, tuple[int, ...]]] = [{}]
    used = 0
    for name, shape in shapes.items():
        if used > SHARD:
            files.append({})
            used = 0
        files[-1][name] = shape
        used += 2 * math.prod(shape)
    where = {}
    for i, part in enumerate(files, 1):
        file = f"model-{i:05}-of-{len(files):05}.safetensors"
        tensors = {
            name: tensor(shape, len(where) + j) for j, (name, shape) in enumerate(part.items())
        }
        save_file(tensors, folder / file)
        where |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@functools.cache
def random_weights(inputs: int) -> np.ndarray:
    """Returns numbers of the scale that weights of so many inputs have."""
    numbers = np.random.default_rng(0).standard_normal(POOL, np.float32)
    return (numbers * inputs**-0.5).astype(ml_dtypes.bfloat16)


def tensor(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Returns weights, or ones for a norm."""
    if len(shape) == 1:
        return np.ones(shape, ml_dtypes.bfloat16)
    return np.resize(np.roll(random_weights(shape[1]), 1009 * seed), shape)


def write_tokenizer(folder: Path, vocab: int) -> None:
    """Writes a byte-level tokenizer that was trained on Python's help texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # pyright: ignore[reportMissingImports]
    from transformers import PreTrainedTokenizerFast  # pyright: ignore[reportMissingImports]

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(topics.values(), trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    wrapped.save_pretrained(folder)


# ------------------------------------------------------------------------------- what it takes


@dataclasses.dataclass
class Held:
    """Bytes: before loading, at most while loading, and after. `pool` is XLA's, on a GPU."""

    process: tuple[int, int, int]
    pool: tuple[int, int, int]
    seconds: float


def anonymous() -> int:
    """Returns what the process itself holds. Pages of mapped files can be dropped at any time."""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def pool(key: str) -> int:
    return (jax.local_devices()[0].memory_stats() or {}).get(key, 0)


def watched_load(*args, **options):
    """`hf_checkpoint.load`, and what was held meanwhile."""
    jax.block_until_ready(jax.numpy.ones(8) + 1)  # starts CUDA
    before, peak, done = (anonymous(), pool("bytes_in_use")), [0], threading.Event()

    def watch():
        while not done.wait(0.005):
            peak[0] = max(peak[0], anonymous())

    thread = threading.Thread(target=watch)
    thread.start()
    start = time.perf_counter()
    loaded = load(*args, **options)
    seconds = time.perf_counter() - start
    done.set()
    thread.join()
    HELD.append(
        Held(
            (before[0], max(peak[0], anonymous()), anonymous()),
            (before[1], pool("peak_bytes_in_use"), pool("bytes_in_use")),
            seconds,
        )
    )
    return loaded


HELD: list[Held] = []
load = hf_checkpoint.load


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the checkpoint is, or shall be")
    parser.add_argument("--shape", choices=llama.SHAPES, default="8b", help="of the model")
    parser.add_argument("--write", action="store_true", help="write the checkpoint, and stop")
    parser.add_argument("--json", type=Path, help="where to save all figures")
    args, options = parser.parse_known_args()
    if not (args.folder / "config.json").exists():
        start = time.perf_counter()
        write(args.folder, llama.SHAPES[args.shape])
        print(f"checkpoint written in {time.perf_counter() - start:.0f} s", flush=True)
    if args.write:
        return 0
    text = args.folder / "help.txt"
    text.write_text("\n".join(topics.values()), encoding="utf-8")
    hf_checkpoint.load = watched_load
    result = qlora.main(
        [str(args.folder), "--text", str(text), "--adapter", str(args.folder / "adapter")]
        + ["--out", str(args.folder / "qlora.png"), *OPTIONS.split(), *options]
    )
    (held,) = HELD
    size = sum(file.stat().st_size for file in args.folder.glob("model*.safetensors"))
    print(f"\n{'GiB':<28}{'before':>9}{'loading':>9}{'loaded':>9}{'training':>10}")
    for name, sizes, end in (
        ("the process (anonymous)", held.process, anonymous()),
        ("XLA's pool", held.pool, pool("peak_bytes_in_use")),
    ):
        print(f"{name:<28}" + "".join(f"{x / GIB:9.2f}" for x in sizes) + f"{end / GIB:10.2f}")
    print(
        f"{size / GIB:.2f} GiB in 16 bits, loaded in {held.seconds:.1f} s;"
        f" {result.tokens_per_second:,.0f} tokens/s, held-out loss {result.before:.4f} before,"
        f" {result.after:.4f} after"
    )
    if args.json:
        figures = {"size": size, **dataclasses.asdict(held), **dataclasses.asdict(result)}
        figures["training_pool"] = pool("peak_bytes_in_use")
        args.json.write_text(json.dumps(figures, default=float))
    return int(not result.after < result.before)


if __name__ == "__main__":
    sys.exit(main())
