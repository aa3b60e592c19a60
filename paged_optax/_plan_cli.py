"""``python -m paged_optax plan``: will it fit?"""

import argparse
import json
import sys
from typing import Any

PAGED_ARGUMENTS = (
    "codec",
    "min_size",
    "replay",
    "param_rounding",
    "device_bytes",
    "headroom_bytes",
)


def add_parser(commands: Any) -> None:
    """Adds the command to those of ``python -m paged_optax``."""
    parser = commands.add_parser(
        "plan",
        help="say whether a training step fits on a GPU, and how to set it up",
        description="Says whether training a model of a published shape fits on a GPU, and how to"
        " set it up. Runs nothing and needs no GPU. The exit status is 0 if it fits, 1 if not.",
    )
    parser.set_defaults(run=run)
    parser.add_argument("--model", required=True, help="7b, 8b, 13b, 24b, 32b, 33b, 65b or 70b")
    parser.add_argument("--card", help="memory of the GPU, such as 48GiB; default: this machine's")
    parser.add_argument("--host", help="host memory for moments; default: what is available here")
    parser.add_argument("--rank", type=int, help="of LoRA adapters; default: train all weights")
    parser.add_argument(
        "--base", help="weights below adapters: nf4 (default), nf4-double, bfloat16"
    )
    parser.add_argument("--batch", type=int, help="sequences in a step; default: 1")
    parser.add_argument("--sequence", type=int, help="tokens in each; default: 2048")
    parser.add_argument("--no-clip", action="store_true", help="gradients are not clipped")
    parser.add_argument(
        "--optimizer",
        default="paged_adamw8bit",
        help="of this library, or optax.NAME; default: %(default)s",
    )
    parser.add_argument("--codec", help="as in Quantization: ratio, ratio6, ratio4, dynamic, ...")
    parser.add_argument("--min-size", type=int, help="as in Quantization, in elements")
    parser.add_argument("--replay", action="store_true", help="keep moments twice")
    parser.add_argument("--param-rounding", help="nearest, stochastic or compensated")
    parser.add_argument("--device-bytes", help="as in Paging: most GPU memory for moments")
    parser.add_argument("--headroom-bytes", help="as in Paging: GPU memory to leave free")
    parser.add_argument("--activations", help="memory for activations, instead of the estimate")
    parser.add_argument("--link", help="bytes per second to the GPU and back at once, such as 25GB")
    parser.add_argument("--json", action="store_true", help="print all numbers as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Prints a plan.

    Returns:
      The exit status: 0 if it fits, 1 if it does not, 2 for arguments that make no sense.
    """
    import paged_optax
    from paged_optax._bytes import parse_bytes

    try:
        plan = paged_optax.plan(
            arguments.model,
            _optimizer(arguments),
            card=arguments.card,
            host=arguments.host,
            rank=arguments.rank,
            base=arguments.base,
            batch=arguments.batch,
            sequence=arguments.sequence,
            clip=not arguments.no_clip,
            activations=arguments.activations,
            link=None if arguments.link is None else parse_bytes("link", arguments.link),
            name=arguments.optimizer,
        )
    except (TypeError, ValueError) as error:
        print(f"paged_optax plan: {error}", file=sys.stderr)
        return 2
    print(json.dumps(plan.to_dict(), indent=2) if arguments.json else plan)
    return 0 if plan.fits else 1


def _optimizer(arguments: argparse.Namespace) -> Any:
    import optax

    import paged_optax

    name = arguments.optimizer
    known = [name for name in paged_optax.__all__ if name.startswith("paged_")]
    if name in known:
        return getattr(paged_optax, name)(1e-4, **_options(arguments))
    given = [key for key in PAGED_ARGUMENTS if getattr(arguments, key)]
    if given:
        raise ValueError(f"--{given[0].replace('_', '-')} is for paged optimizers, not for {name}")
    module, _, function = name.partition(".")
    make = getattr(optax, function, None)
    if module != "optax" or not callable(make):
        raise ValueError(f"unknown optimizer {name!r}; there are {', '.join(known)} and optax.NAME")
    return make(1e-4)


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of a paged optimizer."""
    from paged_optax import Paging, Quantization
    from paged_optax._bytes import parse_bytes

    quantization, paging = {}, {}
    for key in ("codec", "min_size"):
        if getattr(arguments, key) is not None:
            quantization[key] = getattr(arguments, key)
    for key in ("device_bytes", "headroom_bytes"):
        if getattr(arguments, key) is not None:
            paging[key] = parse_bytes(key, getattr(arguments, key))
    rounding = arguments.param_rounding
    if rounding is None:
        rounding = "compensated" if arguments.rank is None else "nearest"
    return {
        "quantization": Quantization(**quantization),
        "paging": Paging(**paging),
        "replay": arguments.replay,
        "param_rounding": rounding,
    }
