"""Results of a sequence, computed ahead of who takes them: in several threads, in some memory."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from ._holding import postponed, work_for

T = TypeVar("T")
R = TypeVar("R")

_THREADS = 4
_BYTES = 256 * 2**20  # of results that nobody has taken yet


def ahead(
    items: Iterable[T],
    compute: Callable[[T], R],
    nbytes_of: Callable[[T], int],
    limit: int = _BYTES,
) -> Iterator[R]:
    """What `compute` makes of items, in order.

    Reading memory and summing it each take one core fully, and a disk takes what several give.

    Args:
      items: to compute.
      compute: called in threads; should not need the GIL for long.
      nbytes_of: memory that a result takes.
      limit: results take no more than this together, or one does alone.

    Raises:
      What `compute` raises, in its place.
    """
    with ThreadPoolExecutor(_THREADS, initializer=work_for, initargs=(postponed(),)) as pool:
        pending: deque[tuple[Future[R], int]] = deque()
        taken = 0
        try:
            for item in items:
                nbytes = nbytes_of(item)
                while pending and taken + nbytes > limit:
                    future, done = pending.popleft()
                    yield future.result()
                    taken -= done
                pending.append((pool.submit(compute, item), nbytes))
                taken += nbytes
            while pending:
                yield pending.popleft()[0].result()
        finally:
            for future, _ in pending:
                future.cancel()
