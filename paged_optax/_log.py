"""What the package tells those who ask: messages of `logging`, and names for profilers.

The logger ``paged_optax`` says at INFO what was moved, freed, saved and restored, and at DEBUG what
was compiled. Its level is the one switch: above WARNING, the package's warnings are off as well.
"""

import logging
import warnings

import jax

from ._bytes import format_bytes

log = logging.getLogger("paged_optax")
log.addHandler(logging.NullHandler())


def named(name: str) -> jax.profiler.TraceAnnotation:
    """A range on the host's line of a profile. It costs nothing where no profiler is attached."""
    return jax.profiler.TraceAnnotation(f"paged_optax.{name}")


def told(text: str, nbytes: int, *values: object) -> int:
    """Logs what was done to how many bytes, and returns these.

    Args:
      text: with a ``%s`` for the bytes, and then one for each of `values`.
      nbytes: the bytes.
      values: what else the text has places for.
    """
    log.info(text, format_bytes(nbytes), *values)
    return nbytes


def warn(text: str, stacklevel: int) -> None:
    """A RuntimeWarning, unless the logger's own level is above WARNING.

    Args:
      text: what it says.
      stacklevel: as that of `warnings.warn` in the caller.
    """
    if log.level <= logging.WARNING:
        warnings.warn(text, RuntimeWarning, stacklevel=stacklevel + 1)
