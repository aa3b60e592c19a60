"""Watches tokens: which steps are under way, and which new states nobody has any more.

While a state that was never updated is out, every step on a GPU has to look at its token, and waits
for the device to do so. Nothing but its tokens can tell that such a state was dropped. So each
token is watched from when it is made until the first update.
"""

import collections
import contextlib
import dataclasses
import threading
import weakref
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from . import _ext
from ._ffi import TOKEN_SHAPE
from ._local import local_handle

# Tokens that programs under way will make, oldest first: also those whose owners are gone already.
_under_way: collections.deque[jax.Array] = collections.deque()

_was_used = _is_child = _is_looking = False
_of_parent: list[jax.Array] = []  # in a forked process: what was under way at the fork
_lock = threading.RLock()  # the handler of a signal may come here while its thread has it
# Objects may end in any thread at any moment, also while the lock is held: what ends is only noted.
_ended: collections.deque[int] = collections.deque()  # ids of weak references


@dataclasses.dataclass
class _Watched:
    """The array of a token."""

    array: jax.Array | None  # until its handle can be read without waiting
    was_handed_on: bool = False  # to a program
    handle: int = 0
    ref: weakref.ref[jax.Array] | None = None


_by_array: dict[int, _Watched] = {}  # by the array's id
_by_ref: dict[int, tuple[int, _Watched]] = {}  # by the reference's id: the array's, and its record
# Arrays that ended, each with those whose handle was not known then.
_gone: list[tuple[_Watched, list[_Watched]]] = []


def watch(value: Any) -> None:
    """A token with this array was made."""
    global _was_used
    if isinstance(value, Tracer):
        return
    _was_used = True
    if not isinstance(value, jax.Array):
        return
    with _lock:
        _under_way.append(value)
        _drop_ready()
        if not _ext.num_unused():
            return
        if not _is_of(_by_array.get(id(value)), value):
            _by_array[id(value)] = _Watched(value)
    look()


def await_steps() -> None:
    """Waits for the programs under way that make tokens, and lets go of these.

    Programs that other threads start meanwhile are left to them.
    """
    with _lock:
        arrays = list(_under_way)
    arrays += live_tokens()
    while arrays:  # none is kept: `look` is to see that it ended
        with contextlib.suppress(RuntimeError, ValueError):  # the program failed, or it was donated
            arrays.pop().block_until_ready()
    with _lock:
        _drop_ready()
    look()


def live_tokens() -> list[jax.Array]:
    """All arrays of this process that may be tokens: also those that an nnx.Variable has.

    In a forked process, only those that are there: the programs of its parent never end in it.
    """
    if not _was_used:
        return []  # without asking JAX, which would look for devices
    found = []
    for platform in {device.platform for device in jax.local_devices()} | {"cpu"}:
        with contextlib.suppress(RuntimeError):  # JAX was told to leave it out
            found += [array for array in jax.live_arrays(platform) if _may_be_token(array)]
    return found


def check_ends(array: Any) -> None:
    """Refuses to wait for a program of the process that this one was forked from.

    Raises:
      StateRefused: if a token is one that such a program was to make.
    """
    if any(array is other for other in _of_parent) and not _is_ready(array):
        raise _ext.StateRefused(
            "paged_optax: the moments of this optimizer state are in the process that this one was"
            " forked from, where its step was under way at that time. Make a new state here with"
            " init(params)."
        )


def _may_be_token(array: jax.Array) -> bool:
    if array.shape != TOKEN_SHAPE or array.dtype != jnp.int32 or array.is_deleted():
        return False
    return not _is_child or _is_ready(array)


def _drop_ready() -> None:
    with contextlib.suppress(IndexError):  # a signal's handler, which the lock lets in, came first
        while _under_way[0].is_deleted() or _is_ready(_under_way[0]):
            _under_way.popleft()


def _is_ready(array: Any) -> bool:
    try:
        return array.is_ready()
    except RuntimeError:  # its backend is gone
        return True


def forget_parent() -> None:
    """In a forked process: the thread that had the lock may not be here."""
    global _lock, _is_child, _is_looking
    _lock = threading.RLock()
    _is_child, _is_looking = True, False
    _of_parent.extend(array for array in _under_way if not array.is_deleted())
    for container in (_under_way, _ended, _by_array, _by_ref, _gone):
        container.clear()


def note_use(value: Any) -> None:
    """A program gets a token with this array."""
    watched = _by_array.get(id(value))
    if watched is not None and _is_of(watched, value):
        watched.was_handed_on = True
    look()


def _is_of(watched: _Watched | None, array: jax.Array) -> bool:
    """Whether a record is of this array, and not of one that is gone and had the same id."""
    if watched is None:
        return False
    return watched.array is array or (watched.ref is not None and watched.ref() is array)


def look() -> None:
    """Forgets the states whose tokens are all gone. Never waits."""
    global _is_looking
    if not _lock.acquire(blocking=False):
        return
    if _is_looking:  # a signal's handler or a notice came in the middle, which the lock lets in
        _lock.release()
        return
    _is_looking = True
    try:
        for key, watched in list(_by_array.items()):
            if watched.array is not None:
                _resolve(key, watched)
        unknown = [watched for watched in list(_by_array.values()) if watched.array is not None]
        while _ended:
            key, watched = _by_ref.pop(_ended.popleft())
            if _by_array.get(key) is watched:
                _by_array.pop(key, None)
            _gone.append((watched, unknown))
        _gone[:] = [(watched, others) for watched, others in _gone if not _settle(watched, others)]
    finally:
        _is_looking = False
        _lock.release()


def _settle(gone: _Watched, others: list[_Watched]) -> bool:
    """Whether it is clear what the end of an array means; if so, acts on it."""
    if any(other.array is not None for other in others):
        return False  # one of them may be a copy
    copies = [watched for watched in list(_by_array.values()) if watched.handle == gone.handle]
    for copy in copies:
        copy.was_handed_on |= gone.was_handed_on
    if not copies:
        (_ext.forget if gone.was_handed_on else _ext.forget_now)(gone.handle)
    return True


def _resolve(key: int, watched: _Watched) -> None:
    """Reads the handle of an array once it is there, and lets go of the array."""
    array = watched.array
    if array is None:
        return
    if array.is_deleted():
        watched.array = None
        _by_array.pop(key, None)  # donated: an update has it
        return
    if not _is_ready(array):
        return
    try:
        handle = local_handle(array) or 0
        handle = handle if handle and _ext.is_unused(handle) else 0
    except Exception:  # of a program that failed, or not a token at all
        handle = 0
    watched.array = None
    if handle == 0:
        _by_array.pop(key, None)
        return
    watched.handle = handle
    watched.ref = weakref.ref(array, lambda ref: _ended.append(id(ref)))
    _by_ref[id(watched.ref)] = (key, watched)
