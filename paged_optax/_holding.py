"""What a thread must not wait for while steps wait for it: it does it later.

While a save has moments open, the garbage collector may run somebody's finalizer in its thread, or
in one that reads for it. If that frees another state, it waits for the steps under way, and these
may wait for the save.
"""

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

Postponed = list[Callable[[], Any]]
_thread = threading.local()


def postponed() -> Postponed | None:
    """What this thread does later; None if nothing waits for it."""
    return getattr(_thread, "postponed", None)


def work_for(calls: Postponed | None) -> None:
    """From here on a thread does the work of another one, which has these calls to make."""
    _thread.postponed = calls


@contextlib.contextmanager
def holding() -> Iterator[None]:
    """Steps wait for this thread; what is postponed meanwhile is done at the end."""
    if postponed() is not None:  # somebody further out does it
        yield
        return
    calls: Postponed = []
    try:
        work_for(calls)
        yield
    finally:
        work_for(None)
        for call in calls:
            _call(call)


def _call(call: Callable[[], Any]) -> None:
    """What it raises concerns nobody who is here."""
    try:
        call()
    except Exception as error:
        warnings.warn(f"what was postponed until a save ended failed: {error}", stacklevel=2)


def postpone(call: Callable[[], Any]) -> bool:
    """Whether steps wait for this thread; then it makes the call when they do not any more."""
    calls = postponed()
    if calls is None:
        return False
    calls.append(call)
    return True
