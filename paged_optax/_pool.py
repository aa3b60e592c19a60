"""XLA's own pool of device memory: how large it is, and whether a smaller one would do."""

import jax

from ._bytes import format_bytes


def xla_pool(ordinal: int) -> tuple[int | None, int | None]:
    """What XLA's allocator holds of a GPU, and the most of it that was in use at one time.

    What is in use now would tell less: between two steps, nothing that a step needs is there.
    """
    try:
        devices = jax.local_devices(backend="gpu")
    except RuntimeError:
        return None, None
    for device in devices:
        if device.local_hardware_id == ordinal:
            stats = device.memory_stats() or {}
            in_use = stats.get("peak_bytes_in_use", stats.get("bytes_in_use"))
            return stats.get("pool_bytes", stats.get("bytes_limit")), in_use
    return None, None


def advise(missing: int, pool: int, in_use: int) -> str:
    """How to make room for `missing` bytes of moments; empty if the pool is not too large."""
    unused = pool - in_use
    if missing <= 0 or unused < missing:
        return ""
    return (
        f"XLA's pool holds {format_bytes(pool)}, of which {format_bytes(unused)} were never in"
        " use. With a smaller pool the moments would have room: set"
        " XLA_PYTHON_CLIENT_MEM_FRACTION to less (the default is 0.75), or"
        " XLA_PYTHON_CLIENT_PREALLOCATE=false."
    )
