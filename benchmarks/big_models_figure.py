"""Draws a model that fits with paged moments and not with optax.adamw: GPU memory over time.

python benchmarks/big_models.py --rows 65b/48 --json big.json
python benchmarks/big_models_figure.py big.json docs/big_model.png
"""

import argparse
import json
import re
from pathlib import Path

import numpy as np
from big_models import GIB
from matplotlib.axes import Axes
from matplotlib.figure import Figure

NAMES = {"adamw": "optax.adamw", "paged": "paged_adamw8bit"}
POOL, MOMENTS, ASKED, DRIVER = "tab:blue", "tab:orange", "tab:red", "black"


def in_gib(samples: list) -> tuple[np.ndarray, np.ndarray]:
    """Returns times and sizes in GiB."""
    times, sizes = np.array(samples).T
    return times, sizes / GIB


def fill(axes: Axes, times, low, high, color: str, label: str) -> None:
    options = {"color": color, "alpha": 0.6, "lw": 0, "step": "post", "label": label}
    axes.fill_between(times, low, high, where=high > low, **options)


def draw(axes: Axes, result: dict, trained: int) -> None:
    """Draws one training of `trained` parameters."""
    paged = result["optimizer"] == "paged"
    times, pool = in_gib(result["pool"])
    clock, driver = in_gib(result["gpu"])
    # optax.adamw's moments are the last thing that the pool takes before the step.
    moments = result["resident"] / GIB if paged else 8 * trained / GIB
    inside = np.where((pool >= pool.max() - 0.01) & (not paged), moments, 0)
    fill(axes, times, np.zeros_like(pool), pool - inside, POOL, "XLA's pool, in use")
    if paged:  # they come with the first step, as the last thing that the driver sees
        fill(
            axes,
            clock,
            driver - moments * (driver >= driver.max() - 0.1),
            driver,
            MOMENTS,
            "moments",
        )
    else:
        fill(axes, times, pool - inside, pool, MOMENTS, "moments")
    axes.plot(clock, driver, color=DRIVER, lw=1.2, label="all GPU memory, as nvidia-smi shows it")
    card = result["card"]
    axes.axhline(card, color="gray", ls="--", lw=1)
    axes.text(0.2, card + 0.6, f"the card has {card:g} GiB", color="gray", size="small")
    axes.set(title=NAMES[result["optimizer"]], xlabel="seconds", xlim=(0, result["wall"]))
    middle = (times[-1] + times[pool > 1][0]) / 2
    if paged:
        said = (
            f"{result['seconds']:.2f} s a step, {result['tokens_per_second']:,.0f} tokens/s\n"
            f"moments: {moments:.1f} GiB on the GPU,\n{result['on_host'] / GIB:.1f} GiB on the host"
        )
    else:
        asked = re.search(r"allocate ([0-9.]+)GiB", result["message"])
        more = float(asked[1]) if asked else 0.0
        bar = {"color": ASKED, "alpha": 0.6, "lw": 0}
        axes.bar(times[-1] - 0.5, more, 1.0, bottom=pool.max(), **bar)
        said = (
            f"moments: {moments:.1f} GiB in the pool\n"
            f"the step asks for {more:.1f} GiB more (red):\nRESOURCE_EXHAUSTED"
        )
    axes.text(middle, 24, said, ha="center", va="center")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", type=Path, help="what big_models.py --json saved")
    parser.add_argument("out", type=Path, help="PNG file to write")
    args = parser.parse_args()
    results = json.loads(args.results.read_text())
    paged = next(r for r in results if r["optimizer"] == "paged" and r["card"])
    adamw = next(r for r in results if r["optimizer"] == "adamw" and r["row"] == paged["row"])
    figure = Figure(figsize=(10, 3.6), layout="constrained")  # without pyplot: needs no display
    left, right = figure.subplots(1, 2, sharey=True)
    draw(left, adamw, paged["trained"])
    draw(right, paged, paged["trained"])
    left.set(ylabel="GiB", ylim=(0, 1.12 * paged["card"]))
    right.legend(loc="lower right", framealpha=1, fontsize="small")
    model = paged["row"].partition("/")[0].upper()
    figure.suptitle(
        f"QLoRA of a {model} model on a {paged['card']:g} GB card:"
        f" {paged['trained'] / 1e6:,.0f}M parameters are trained, {paged['length']:,} tokens a step"
    )
    figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
    main()
