"""Tells the user that a step was refused: at a place where nothing gets lost.

A refused step cannot fail its program: XLA would take the parameters with it. Nor can the program
be interrupted as by Ctrl-C, since what a call has just returned, and donated arrays went into,
would be dropped. So the exception comes when a state is next handed to a program: JAX takes its
arguments apart, in the thread that calls, before it runs or donates anything.
"""

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from . import _ext
from ._ffi import TOKEN_SHAPE
from ._local import local_handle
from ._log import warn

StateRefused: type[RuntimeError] = _ext.StateRefused

# Modules of JAX that take apart what a program is about to get, and never what it has returned.
_ENTRIES = ("jax._src.stages", "jax._src.lax.")
_OF_TREES = ("jax._src.tree", "jax._src.flattree", "jax._src.api_util", "jax.tree")


def stop_if_refused(value: Any) -> None:
    """Raises if a step of a state was refused, nobody has been told, and a program gets the state.

    Args:
      value: what a token holds, which is being taken apart: an array, or an nnx.Variable of one.

    Raises:
      StateRefused: says why.
    """
    if not _ext.any_refused() or isinstance(value, Tracer):
        return
    if isinstance(value, jax.Array):
        if not is_entry():
            return
    else:  # nnx changes its variables in place, so nothing can get lost
        leaves = jax.tree.leaves(value)
        if (
            len(leaves) != 1
            or not isinstance(leaves[0], jax.Array)
            or isinstance(leaves[0], Tracer)
        ):
            return
        (value,) = leaves
    if value.is_deleted():
        _ext.raise_refused()  # whose it was nobody knows, and the call fails anyway
    elif value.shape == TOKEN_SHAPE and value.dtype == jnp.int32:
        _await(value)
        _raise_refused(value)


def _raise_refused(token: jax.Array) -> None:
    handle = local_handle(token)
    if handle is not None:  # which would ask for any state
        _ext.raise_refused(handle)


def _await(token: jax.Array) -> None:
    """Waits for every device: each refuses the step, and all of them are told of at once."""
    with contextlib.suppress(RuntimeError):  # the program failed, which whoever gets it will see
        token.block_until_ready()


def tell_refusals() -> None:
    """Raises if a step of any state was refused, and nobody has been told.

    Raises:
      StateRefused: says why.
    """
    if _ext.any_refused():
        _ext.raise_refused()


def is_entry() -> bool:
    """Whether a token is taken apart for a program.

    A compiled function is called from Python without a frame of JAX between. Where a frame of JAX
    asks, as that of jax.block_until_ready, the state may be what a program has just returned.
    """
    frame, names = sys._getframe(2), []
    while frame is not None and len(names) < 2:
        name = str(frame.f_globals.get("__name__", ""))
        is_ours, is_of_trees = name == "paged_optax._state", name.startswith(_OF_TREES)
        if not is_ours and not (names and is_of_trees):
            names.append(name)
        frame = frame.f_back
    if not names or not names[0].startswith(("jax.", "jaxlib.")):
        return True
    asker = names[-1] if names[0].startswith(_OF_TREES) else names[0]
    return asker.startswith(_ENTRIES)


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
            _raise_refused(token)


def warn_of_refusal(text: str) -> None:
    """Warns as soon as a refusal is known; where warnings are errors, the exception is enough."""
    if _thread.stops_at_once:
        return
    text = text if text.startswith("paged_optax: ") else f"paged_optax: {text}"
    outcome = "" if "was lost after it had begun" in text else "The step changed nothing. "
    message = f"{text} ({outcome}The next use of the state raises StateRefused.)"
    with contextlib.suppress(RuntimeWarning):
        warn(message, stacklevel=3)
