"""Does `paged_adamw8bit` learn what `optax.adamw` learns? The LoRA example under both.

For every seed it trains one base model and fine-tunes it twice, from the same weights and on the
same text in the same order. Only the optimizer of the adapters differs. It prints the held-out
losses, and exits with status 1 if any pair differs by more than 2 %.

    python benchmarks/lora_quality.py                    # about 8 minutes of CPU time
    python benchmarks/lora_quality.py --steps 300        # options of examples/lora_finetune.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import lora_finetune  # noqa: E402  # pyright: ignore[reportMissingImports]

SEEDS = (0, 1, 2)
TOLERANCE = 0.02


def main(options: list[str]) -> int:
    """Runs all seeds with `options` for the example; returns the exit status."""
    print(f"{'seed':>4}{'before':>10}{'adamw':>10}{'paged':>10}{'difference':>12}")
    differences = []
    for seed in SEEDS:
        arguments = [*options, "--seed", str(seed), "--optimizer"]
        adamw = lora_finetune.parse_args([*arguments, "adamw"])
        paged = lora_finetune.parse_args([*arguments, "paged_adamw8bit"])
        base = lora_finetune.pretrain(adamw)
        expected = lora_finetune.finetune(base, adamw)
        actual = lora_finetune.finetune(base, paged)
        differences.append(actual.after / expected.after - 1.0)
        print(
            f"{seed:>4}{expected.before:>10.4f}{expected.after:>10.4f}{actual.after:>10.4f}"
            f"{differences[-1]:>+12.2%}",
            flush=True,
        )
    within = all(abs(difference) <= TOLERANCE for difference in differences)  # NaN is not
    print(f"{'all' if within else 'NOT all'} within {TOLERANCE:.0%}")
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
