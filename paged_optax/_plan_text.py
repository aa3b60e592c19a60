"""A plan in words: a table beside `optax.adamw`, and what to set."""

from typing import Any

from ._bytes import format_bytes


def describe(plan: Any) -> str:
    """The text of a `Plan`."""
    usage, other = plan.usage, plan.other
    lines = [f"{plan.subject}, on a GPU of {format_bytes(plan.card)}: {_verdict(plan)}", ""]
    names = [usage.optimizer, other.optimizer]
    rows: list[tuple[str, Any, Any]] = [
        ("frozen weights and inputs", plan.frozen, plan.frozen),
        ("parameters", plan.params, plan.params),
        ("gradients", plan.gradients, plan.gradients),
        ("optimizer state in XLA's pool", usage.state, other.state),
        ("activations and the like", usage.temporaries, other.temporaries),
        ("XLA's pool, at most in use", usage.pool, other.pool),
        ("moments in GPU memory", usage.resident, other.resident),
        ("CUDA and its libraries", plan.context, plan.context),
        ("the GPU, in all", plan.total, other.pool + other.resident + plan.context),
        ("moments in host memory", usage.on_host, other.on_host),
        ("host memory for moments", usage.host, other.host),
    ]
    if not plan.frozen:
        rows = [row for row in rows if not row[0].startswith("frozen")]
    if not plan.gradients:
        rows = [row for row in rows if row[0] != "gradients"]
    width = max(18, *(len(name) + 2 for name in names))
    lines.append(f"{'':<30}" + "".join(f"{name:>{width}}" for name in names))
    for label, *values in rows:
        cells = ["not known" if value is None else format_bytes(value) for value in values]
        lines.append(f"{label:<30}" + "".join(f"{cell:>{width}}" for cell in cells))
    return "\n".join([*lines, "", *_advice(plan)])


def _verdict(plan: Any) -> str:
    if not plan.fits:
        return "it does not fit"
    if plan.usage.temporaries is None:
        return "it may fit"
    return "it just fits" if plan.is_tight else "it fits"


def _advice(plan: Any) -> list[str]:
    usage, lines = plan.usage, []
    for side in (usage, plan.other):
        for problem in side.problems:
            lines.append(f"{side.optimizer} does not fit: {problem}.")
    if plan.usage.temporaries is None:
        left = format_bytes(max(0, plan.card - plan.total))
        lines.append(
            f"Activations are not counted; {left} are left for them. To count them, pass"
            " compiled=jax.jit(step).lower(...).compile(), or activations=."
        )
    if plan.is_tight:
        lines.append(
            f"It is tight: {format_bytes(plan.card - plan.total)} are left for holes between XLA's"
            f" buffers, and {format_bytes(usage.reserve)} are advisable."
        )
    if usage.fits:
        lines += _settings(plan)
    return lines


def _settings(plan: Any) -> list[str]:
    usage, lines = plan.usage, []
    if usage.mem_fraction is not None:
        fraction = f"{usage.mem_fraction:.3f}".lstrip("0").rstrip("0")
        lines.append(f"Set XLA_PYTHON_CLIENT_MEM_FRACTION={fraction} before JAX starts.")
    elif usage.temporaries is not None:
        lines.append("XLA's default pool, 75 % of the GPU, is large enough: set nothing.")
    if not usage.moments:
        return lines
    cost = f"add {usage.host_milliseconds:.0f} ms to a step"
    if not usage.on_host:
        where = "all moments have room on the GPU"
    elif not usage.resident:
        where = f"all moments are in host memory, and {cost}"
    else:
        where = (
            f"{format_bytes(usage.resident)} of {format_bytes(usage.moments)} of moments are on the"
            f" GPU, and the others {cost}"
        )
    return [*lines, f"With paging={usage.paging}, {where}."]
