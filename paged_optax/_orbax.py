"""Orbax carries moments: what a user saves and restores with any of its APIs.

What this promises. Where Orbax saves an optimizer state, the moments go into a folder
``paged_optax`` in the same item of the checkpoint, in a safetensors file a process. Orbax commits a
checkpoint after its files are complete, and this one counts among them. The copy is taken before
Orbax's ``save`` returns, so training may go on at once. It goes into a file next to the checkpoint
from the start, and into memory as far as the disk is slower than the copy. Where Orbax restores the
state, the token is a new one for these moments, whatever the target was.

How. All array leaves of all its APIs go through ``serialize`` and ``deserialize`` of two public
classes, `ArrayHandler` and `NumpyHandler`. Their methods are wrapped when the user's program
imports Orbax; this package never imports it. A registered handler instead would be replaced by the
next program that registers one, and Orbax's second API does not ask it. A leaf is a token if it is
int32[2] and this process gave its handle out; in a checkpoint, if it is int32[2] and there is a
file of that name.

How to do without. The environment variable ``PAGED_OPTAX_ORBAX=0``, or `use_orbax_hook`. Orbax then
saves bare tokens.

What fails when Orbax changes: ``tests/test_checkpoint.py::test_orbax_has_what_we_wrap``.
"""

import contextlib
import errno
import functools
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import _checkpoint_file, _ext
from ._after_import import after_import
from ._checkpoint import merge_files
from ._contents import Contents, FilePart, copy, nbytes_of
from ._ffi import TOKEN_SHAPE
from ._local import local_token
from ._log import warn
from ._part_file import PartFile, replacing
from ._state import new_token
from ._transfer import opened, stage

FOLDER = "paged_optax"  # in the folder of an item
_CHUNK = 16 * 2**20  # bytes, to and from other storage

_is_on = os.environ.get("PAGED_OPTAX_ORBAX", "1") != "0"


def use_orbax_hook(enabled: bool) -> None:
    """Whether Orbax carries moments in what it saves and restores from now on.

    It does by default, unless the environment variable ``PAGED_OPTAX_ORBAX`` is 0. Without the hook
    Orbax saves bare tokens, which no other process accepts.

    Args:
      enabled: whether it does.

    Example:
      >>> import paged_optax
      >>> paged_optax.use_orbax_hook(False)
      >>> paged_optax.use_orbax_hook(True)
    """
    global _is_on
    _is_on = bool(enabled)


# --- Saving --------------------------------------------------------------------------------------


def _wrap_serialize(plain: Any) -> Any:
    @functools.wraps(plain)
    async def serialize(self: Any, values: Any, infos: Any, args: Any = None) -> Any:
        values = list(values)
        # What cannot be saved is refused before Orbax has begun anything.
        copies = _copy_all(values, infos) if _is_on else {}
        futures = list(await plain(self, values, infos, args))
        return futures + [_future(*copy) for copy in copies.items()]

    return serialize


class _Copy(NamedTuple):
    """The moments of one state as they are now."""

    moments: "Contents | _Early | None"  # None for a state that was never updated
    info: Any  # Orbax's, of the token's leaf


def _copy_all(values: Sequence[Any], infos: Sequence[Any]) -> dict[tuple[int, int], _Copy]:
    """Copies the moments of every state among the leaves, by token."""
    copies: dict[tuple[int, int], _Copy] = {}  # the same token may be there twice
    for value, info in zip(values, infos, strict=True):
        token = _token_of(value)
        if token is None or token in copies:
            continue
        with opened(value) as contents:
            copies[token] = _Copy(contents and _copy(contents, token, info), info)
    return copies


def _copy(contents: Contents, token: tuple[int, int], info: Any) -> "Contents | _Early":
    folder, room = _existing_folder(info), _ext.available_host_bytes() // 2
    if folder is None and nbytes_of(contents) <= room:
        return copy(contents)
    return _Early(folder or _folder(), contents, token, room)


def _token_of(value: Any) -> tuple[int, int] | None:
    """Handle and version, if a leaf is a token of this process."""
    pair = _pair_of(value)
    return pair if pair is not None and _ext.is_issued(pair[0]) else None


def _pair_of(value: Any) -> tuple[int, int] | None:
    """The two numbers of a leaf that looks like a token; None if this process has not both."""
    if not isinstance(value, jax.Array | np.ndarray):
        return None
    if value.dtype != jnp.int32 or value.shape != TOKEN_SHAPE:
        return None
    found = local_token(value) if isinstance(value, jax.Array) else value
    return None if found is None else tuple(found.tolist())


class _Early:
    """Moments that are written before Orbax has made the folder where they belong.

    Until then the file is next to the checkpoint. It goes with this object.
    """

    def __init__(self, folder: str, contents: Contents, token: tuple[int, int], room: int):
        # What a killed process left has the same stem, and goes when this one is made.
        self._part = PartFile(folder, f".paged_optax-{jax.process_index()}")
        with self._removed_after_errors():
            self._rest = _checkpoint_file.Background(
                self._part.path, [contents], room, **_about(token)
            )

    @contextlib.contextmanager
    def _removed_after_errors(self) -> Iterator[None]:
        # Not when this object goes: the error refers to it.
        try:
            yield
        except BaseException:
            self._part.close()
            raise

    def move(self, path: Any) -> None:
        """Puts the complete file where it belongs, on whatever file system that is."""
        source = self._part.path
        with self._removed_after_errors():
            self._rest.finish()
            if not _is_local(path):
                with open(source, "rb") as file, path.open("wb") as target:
                    shutil.copyfileobj(file, target, _CHUNK)
            else:
                try:
                    self._part.move(os.fspath(path))
                except OSError as error:
                    if error.errno != errno.EXDEV:
                        raise
                    with replacing(os.fspath(path)) as part:
                        whole = FilePart(source, 0, os.path.getsize(source), None)
                        _ext.write_arrays(part, [whole])
        self._part.close()


def _future(token: tuple[int, int], copied: _Copy) -> Any:
    """What Orbax has to wait for before it commits the checkpoint."""
    from orbax.checkpoint import future

    # TypeHandler's contract: nothing may be in Orbax's folders before it has made them, and it may
    # wait with that until all leaves are on their way.
    commit = _commit(token, copied)
    return future.CommitFutureAwaitingContractedSignals(commit, name="paged_optax")


async def _commit(token: tuple[int, int], copied: _Copy) -> None:
    if hasattr(copied.info, "await_path_creation"):  # since 0.11.40
        await copied.info.await_path_creation()
    folder = copied.info.parent_dir / FOLDER
    folder.mkdir(exist_ok=True)
    path = folder / f"{_name(token)}.{jax.process_index()}.safetensors"
    if isinstance(copied.moments, _Early):
        copied.moments.move(path)
    elif _is_local(path):
        with replacing(os.fspath(path)) as part:
            _checkpoint_file.write(part, [copied.moments], **_about(token))
    else:
        with path.open("wb") as file:
            _checkpoint_file.stream(file, [copied.moments], **_about(token))


def _about(token: tuple[int, int]) -> dict[str, Any]:
    """What the file says of the state."""
    return {"processes": jax.process_count(), "tokens": [token]}


def _existing_folder(info: Any) -> str | None:
    """A local folder on the file system of the checkpoint; None where that is not known yet."""
    try:
        folder = info.parent_dir
    except ValueError:  # of Orbax: it waits for the storage to choose a path
        return None
    if not _is_local(folder):
        return None
    # Orbax may delete a temporary folder that an earlier process left, to make it anew.
    while not folder.is_dir() or "orbax-checkpoint-tmp" in os.fspath(folder):
        folder = folder.parent
    # Another process of the job may be the one that may write there.
    return os.fspath(folder) if os.access(folder, os.W_OK | os.X_OK) else None


def _name(token: tuple[int, int]) -> str:
    handle, version = token
    return f"{handle}-{version}"


def _is_local(path: Any) -> bool:
    return "://" not in os.fspath(path)


# --- Restoring -----------------------------------------------------------------------------------


def _wrap_deserialize(plain: Any) -> Any:
    @functools.wraps(plain)
    async def deserialize(self: Any, infos: Any, args: Any = None) -> Any:
        values = list(await plain(self, infos, args))
        if _is_on and infos:
            _restore(values, infos)
        return values

    return deserialize


def _restore(values: list[Any], infos: Sequence[Any]) -> None:
    """Puts new tokens in the places of those that the checkpoint has moments of."""
    tokens: dict[tuple[str, str], np.ndarray] = {}  # the same token may be there twice
    for i, (value, info) in enumerate(zip(values, infos, strict=True)):
        pair = _pair_of(value)
        if pair is None:
            continue
        folder, name = info.parent_dir / FOLDER, _name(pair)
        key = os.fspath(folder), name
        if key not in tokens:
            paths = sorted(folder.glob(f"{name}.*.safetensors")) if folder.exists() else []
            if not paths:
                continue
            tokens[key] = _new_token(value, paths)
        values[i] = _put(tokens[key], value)


def _new_token(value: Any, paths: Sequence[Any]) -> np.ndarray:
    """A token for the moments in files."""
    (contents,) = merge_files([_local_copy(path) for path in paths])
    shared = isinstance(value, jax.Array) and not value.is_fully_addressable
    if contents is not None:
        return stage(contents, shared=shared)
    if not shared:
        return np.asarray(new_token(num_leaves=1).value)
    # One program of all processes, so that they get the same handle.
    issue = jax.jit(lambda: new_token(num_leaves=1).value, out_shardings=value.sharding)
    return np.asarray(issue().addressable_shards[0].data)


def _put(token: np.ndarray, like: Any) -> Any:
    if isinstance(like, np.ndarray):
        return token
    return jax.make_array_from_callback(token.shape, like.sharding, lambda index: token[index])


def _local_copy(path: Any) -> str:
    """The path of a file that the extension can read; of others, a copy until the process ends."""
    if _is_local(path):
        return os.fspath(path)
    with path.open("rb") as source, open(os.path.join(_folder(), path.name), "wb") as target:
        shutil.copyfileobj(source, target, _CHUNK)
    return target.name


@functools.cache
def _folder() -> str:
    folder = tempfile.TemporaryDirectory(prefix="paged_optax")
    _folders.append(folder)
    return folder.name


_folders: list[Any] = []  # they are removed when the process ends


# --- Wrapping ------------------------------------------------------------------------------------


def _install() -> None:
    """Wraps the methods of Orbax's handlers, once each."""
    from orbax.checkpoint import type_handlers  # which is imported already

    try:
        classes = [type_handlers.ArrayHandler, type_handlers.NumpyHandler]
        if "deserialize" in vars(type_handlers.SingleReplicaArrayHandler):
            classes.append(type_handlers.SingleReplicaArrayHandler)
        for cls in classes:
            for name, wrap in (("serialize", _wrap_serialize), ("deserialize", _wrap_deserialize)):
                method = vars(cls).get(name)
                if method is not None and not hasattr(method, "_is_of_paged_optax"):
                    wrapped = wrap(method)
                    wrapped._is_of_paged_optax = True
                    setattr(cls, name, wrapped)
    except AttributeError as error:
        warn(
            f"paged_optax does not know this version of Orbax ({error}), so that moments are not"
            " saved by it. Use paged_optax.save_moments.",
            stacklevel=2,
        )


after_import("orbax.checkpoint", _install)
