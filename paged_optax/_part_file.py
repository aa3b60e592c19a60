"""Files that are not complete yet: next to where they belong, until they get their name.

A process that is killed leaves such a file. A lock on it ends with the process, so whoever makes
the next one in its place can tell, and removes what was left.
"""

import contextlib
import fcntl
import glob
import itertools
import os
import re
import weakref
from collections.abc import Iterator

_numbers = itertools.count()


class PartFile:
    """A new, empty file ``.STEM.PID-NUMBER.part`` in a folder, which goes with this object.

    Attributes:
      path: the file.
    """

    def __init__(self, folder: str, stem: str):
        _remove_leftovers(folder, stem)
        self.path, self._fd = _make(folder, stem)
        self._close = weakref.finalize(self, _close, self.path, self._fd, os.getpid())

    def move(self, path: str) -> None:
        """Gives the complete file its name, on the disk too; in the same file system.

        A file of that name is replaced in one step.
        """
        os.fsync(self._fd)
        os.replace(self.path, path)
        folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name has to be on the disk too
        finally:
            os.close(folder)

    def close(self) -> None:
        """Removes the file unless it has its name."""
        self._close()


@contextlib.contextmanager
def replacing(path: str) -> Iterator[str]:
    """The path of a new file that takes the place of `path` when it is complete and on the disk.

    Whatever happens before, a file that was there stays as it was. A symbolic link stays too, and
    the file that it points to is replaced.
    """
    path = os.path.realpath(path)
    folder, name = os.path.split(path)
    part = PartFile(folder, f".{name}")
    try:
        yield part.path
        part.move(path)
    finally:
        part.close()


def _make(folder: str, stem: str) -> tuple[str, int]:
    """A new file with a lock on it, and its descriptor."""
    while True:
        path = os.path.join(folder, f"{stem}.{os.getpid()}-{next(_numbers)}.part")
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:  # a process of this number left it, where no lock tells
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # another process found it first, and removes it
            os.close(fd)
            continue
        except OSError:  # the file system has no locks: nobody removes it then
            pass
        if os.path.exists(path):
            return path, fd
        os.close(fd)  # another process found it before it was locked


def _remove_leftovers(folder: str, stem: str) -> None:
    """Removes files of processes that are gone."""
    for path in glob.glob(os.path.join(glob.escape(folder), f"{glob.escape(stem)}.*.part")):
        if not re.fullmatch(rf"{re.escape(stem)}\.\d+(-\d+)?\.part", os.path.basename(path)):
            continue
        with contextlib.suppress(OSError):  # it is locked, or another process was faster
            fd = os.open(path, os.O_RDWR)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(path)
            finally:
                os.close(fd)


def _close(path: str, fd: int, pid: int) -> None:
    if os.getpid() == pid:  # not in a forked process
        with contextlib.suppress(OSError):  # it has another name by now
            os.unlink(path)
    os.close(fd)
