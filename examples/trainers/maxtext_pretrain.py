"""MaxText's pre-training with a paged optimizer: a small Llama on made-up tokens, on any machine.

    python examples/trainers/maxtext_pretrain.py run steps=20

`docs/trainers.md` has the line that installs what this needs. Arguments after the folder are
MaxText's own, ``name=value``. They replace those of `SMALL`: ``hardware=gpu`` for a GPU.

MaxText's ``opt_type`` is one of a fixed list, so a paged optimizer takes the place of
``optax.adamw``, which MaxText looks up. Its checkpoints hold the moments: a run that was killed
goes on when the command is run again.
"""

import argparse
import os
from pathlib import Path

import optax

import paged_optax

SMALL = {
    "base_num_decoder_layers": 2,
    "base_emb_dim": 128,
    "base_mlp_dim": 256,
    "base_num_query_heads": 4,
    "base_num_kv_heads": 2,
    "head_dim": 32,
    "vocab_size": 256,
    "max_target_length": 32,
    "per_device_batch_size": 2,
    "learning_rate": 1e-2,
    "steps": 20,
    "learning_rate_schedule_steps": 20,  # the same in a run of fewer steps
    "checkpoint_period": 10,
    "dataset_type": "synthetic",
    "attention": "dot_product",
    "sharding_tolerance": 1.0,  # so small a model need not be cut over all devices
    "hardware": "cpu",
    "skip_jax_distributed_system": True,  # one process
    "enable_tensorboard": False,
    "jax_cache_dir": "",  # and not a folder in the user's home
}


def adamw(*args, mu_dtype=None, **kwargs):
    """MaxText passes `mu_dtype`, the type of its weights. Paged moments have 8 bits."""
    return paged_optax.paged_adamw8bit(*args, **kwargs)


def main():
    parser = argparse.ArgumentParser(description="MaxText's pre-training, paged.")
    parser.add_argument("folder", type=Path, help="of checkpoints and of metrics.jsonl")
    parser.add_argument("settings", nargs="*", metavar="NAME=VALUE", help="MaxText's own")
    args = parser.parse_args()
    folder = args.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    places = {
        "run_name": "paged",
        "base_output_directory": folder,
        "metrics_file": folder / "metrics.jsonl",
    }
    settings = SMALL | places | dict(setting.split("=", 1) for setting in args.settings)
    optax.adamw = adamw
    os.environ.setdefault("DECOUPLE_GCLOUD", "TRUE")  # no Google Cloud; read when it is imported
    import maxtext  # pyright: ignore[reportMissingImports]
    from maxtext.trainers.pre_train import train  # pyright: ignore[reportMissingImports]

    base = Path(maxtext.__path__[0]) / "configs/base.yml"
    train.main(["", str(base), *(f"{name}={value}" for name, value in settings.items())])


if __name__ == "__main__":
    main()
