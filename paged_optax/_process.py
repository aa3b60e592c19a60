"""What importing the package does to the process: warnings from C++, and hooks at exit and fork."""

import atexit
import os
import warnings

from . import _ext
from ._report import advise, xla_pool

_said: set[int] = set()


def _on_notice(ordinal: int, missing_bytes: int, text: str) -> None:
    """Warns of what the C++ side has to say; of short memory once a GPU."""
    if missing_bytes:
        if ordinal in _said:
            return
        _said.add(ordinal)
        pool, in_use = xla_pool(ordinal)
        if pool is not None and in_use is not None:
            text = f"{text} {advise(missing_bytes, pool, in_use)}".rstrip()
    warnings.warn(f"paged_optax: {text}", RuntimeWarning, stacklevel=2)


_ext.set_notice_handler(_on_notice)
# Before Python, and then CUDA, are taken down. A forked process has no pagers to wait for.
atexit.register(_ext.stop_pagers)
os.register_at_fork(after_in_child=lambda: atexit.unregister(_ext.stop_pagers))
