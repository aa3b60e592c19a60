"""Tells the user that a step was refused: at a place where nothing gets lost.

A refused step cannot fail its program: XLA would take the parameters with it. Nor can the program
be interrupted as by Ctrl-C, since what a call has just returned, and donated arrays went into,
would be dropped. So the exception comes where a state is next handed to anything: JAX then takes
the state apart, in the thread that uses it, before it runs or donates anything.
"""

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from . import _ext
from ._ffi import TOKEN_SHAPE

StateRefused: type[RuntimeError] = _ext.StateRefused


def stop_if_refused(value: Any) -> None:
    """Raises if a step of a state was refused and nobody has been told.

    Args:
      value: the array of a token, which is about to be used.

    Raises:
      StateRefused: says why.
    """
    if not _ext.any_refused() or isinstance(value, Tracer) or not isinstance(value, jax.Array):
        return
    if value.is_deleted():
        _ext.raise_refused()  # whose it was nobody knows, and the call fails anyway
    elif value.shape == TOKEN_SHAPE:
        _ext.raise_refused(_handle(value))


class _Thread(threading.local):
    stops_at_once = False


_thread = _Thread()


@contextlib.contextmanager
def stopping_at_once(token: Any) -> Iterator[Callable[[Any], None]]:
    """Around an update that may not be compiled into a program.

    Args:
      token: the array of the token that goes in.

    Yields:
      A function to call with the array of the token that comes out. If nothing is being traced, it
      waits for that and raises `StateRefused` if the step was refused.
    """
    if isinstance(token, Tracer):
        yield lambda new_token: None
        return
    _thread.stops_at_once = True
    try:
        yield _stop
    finally:
        _thread.stops_at_once = False


def _stop(token: Any) -> None:
    if isinstance(token, jax.Array) and not isinstance(token, Tracer):
        token.block_until_ready()
        if _ext.any_refused():
            _ext.raise_refused(_handle(token))


def _handle(token: jax.Array) -> int:
    return int(np.asarray(token.addressable_shards[0].data)[0])


def warn_of_refusal(text: str) -> None:
    """Warns as soon as a refusal is known; where warnings are errors, the exception is enough."""
    if _thread.stops_at_once:
        return
    message = f"{text} (The step changed nothing. The next use of the state raises StateRefused.)"
    with contextlib.suppress(RuntimeWarning):
        warnings.warn(message, RuntimeWarning, stacklevel=3)
