"""What importing the package does to the process: warnings from C++, and hooks at exit and fork."""

import atexit
import os

from . import _ext, _watch
from ._bytes import format_bytes
from ._log import log, warn
from ._pool import advise, xla_pool
from ._refused import warn_of_refusal
from ._states import lost_bytes

_platform = "cuda"  # whose memory notices are about
_said: set[int] = set()  # GPUs whose memory was said to be short


def _on_notice(ordinal: int, missing_bytes: int, text: str, kind: str) -> None:
    """Passes a notice of the C++ code on as a warning; of short memory, once per GPU."""
    if kind == "news":
        log.info("%s", text)
        return
    if kind == "refusal":
        warn_of_refusal(text)
        return
    if missing_bytes:
        if ordinal in _said:
            return
        _said.add(ordinal)
        pool, in_use = xla_pool(ordinal)
        if pool is not None and in_use is not None:
            text = f"{text} {advise(missing_bytes, pool, in_use)}".rstrip()
        text += _about_lost(ordinal)
    warn(f"paged_optax: {text}", stacklevel=2)


def _about_lost(ordinal: int) -> str:
    """What states that nobody holds keep from the others."""
    count, nbytes = lost_bytes(_platform, ordinal)
    if not count:
        return ""
    return (
        f" {count} state(s) that no array of this process names have {format_bytes(nbytes)} of"
        " moments there: paged_optax.release([s for s in paged_optax.states() if not s.is_held])"
        " frees them."
    )


_ext.set_notice_handler(_on_notice)
# No thread of ours or of XLA may wait for the GIL of an interpreter that ends.
atexit.register(_ext.close_interpreter)
# Pagers must stop before Python, and then CUDA, shut down.
atexit.register(_ext.stop_pagers)


def _forget_parent() -> None:
    """In a forked process: it has no pager to stop, and no thread that could give up a lock."""
    atexit.unregister(_ext.stop_pagers)
    _ext.forget_parent()
    _watch.forget_parent()


os.register_at_fork(after_in_child=_forget_parent)
