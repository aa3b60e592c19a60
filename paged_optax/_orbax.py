"""Orbax carries moments: what a user saves and restores with any of its APIs.

What this promises. Where Orbax saves an optimizer state, the moments go into a folder
``paged_optax`` in the same item of the checkpoint, in a safetensors file a process. Orbax commits a
checkpoint after its files are complete, and this one counts among them. The copy is taken before
Orbax's ``save`` returns, so training may go on at once. Where Orbax restores the state, the token
is a new one for these moments, whatever the target was.

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
import functools
import os
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from typing import Any, BinaryIO, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import _checkpoint_file, _ext
from ._after_import import after_import
from ._checkpoint import merge_files
from ._contents import Contents, copy, nbytes_of
from ._ffi import TOKEN_SHAPE
from ._log import warn
from ._state import new_token
from ._transfer import opened, stage

FOLDER = "paged_optax"  # in the folder of an item

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

    moments: "Contents | _Spill | None"  # None for a state that was never updated
    info: Any  # Orbax's, of the token's leaf


def _copy_all(values: Sequence[Any], infos: Sequence[Any]) -> dict[tuple[int, int], _Copy]:
    """Copies the moments of every state among the leaves, by token."""
    copies: dict[tuple[int, int], _Copy] = {}  # the same token may be there twice
    for value, info in zip(values, infos, strict=True):
        token = _token_of(value)
        if token is None or token in copies:
            continue
        with opened(value) as contents:
            if contents is None:
                copies[token] = _Copy(None, info)
            elif nbytes_of(contents) > _ext.available_host_bytes() // 2:
                copies[token] = _Copy(_Spill(contents, token, info), info)
            else:
                copies[token] = _Copy(copy(contents), info)
    return copies


def _token_of(value: Any) -> tuple[int, int] | None:
    """Handle and version, if a leaf is a token of this process."""
    if not isinstance(value, jax.Array | np.ndarray):
        return None
    if value.dtype != jnp.int32 or value.shape != TOKEN_SHAPE:
        return None
    local = value.addressable_shards[0].data if isinstance(value, jax.Array) else value
    handle, version = np.asarray(local).tolist()
    return (handle, version) if _ext.is_issued(handle) else None


class _Spill:
    """Moments that host memory has no room for, in a file next to the checkpoint.

    It is there until Orbax has made the folder where they belong, and goes with this object.
    """

    def __init__(self, contents: Contents, token: tuple[int, int], info: Any):
        name = f".paged_optax-{_name(token)}.{jax.process_index()}.{os.getpid()}.part"
        self.path = os.path.join(_existing_folder(info), name)
        weakref.finalize(self, _remove, self.path, os.getpid())
        with _checkpoint_file.replacing(self.path) as file:
            _write(file, contents, token)

    def move(self, path: Any) -> None:
        """Puts the file where it belongs."""
        if _is_local(path) and os.stat(path.parent).st_dev == os.stat(self.path).st_dev:
            _checkpoint_file.move(self.path, os.fspath(path))
            return
        with open(self.path, "rb") as source, _writing(path) as target:
            shutil.copyfileobj(source, target)


def _remove(path: str, pid: int) -> None:
    if os.getpid() == pid:  # not in a forked process
        with contextlib.suppress(OSError):
            os.unlink(path)


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
    if isinstance(copied.moments, _Spill):
        copied.moments.move(path)
    else:
        with _writing(path) as file:
            _write(file, copied.moments, token)


def _write(file: BinaryIO, contents: Contents | None, token: tuple[int, int]) -> None:
    _checkpoint_file.write(file, [contents], processes=jax.process_count(), tokens=[token])


def _existing_folder(info: Any) -> str:
    """A folder on the file system of the checkpoint; a local one where that is not known yet."""
    try:
        folder = info.parent_dir
    except ValueError:  # of Orbax: it waits for the storage to choose a path
        return _folder()
    if not _is_local(folder):
        return _folder()
    # Orbax may delete a temporary folder that an earlier process left, to make it anew.
    while not folder.is_dir() or "orbax-checkpoint-tmp" in os.fspath(folder):
        folder = folder.parent
    return os.fspath(folder)


def _name(token: tuple[int, int]) -> str:
    handle, version = token
    return f"{handle}-{version}"


def _writing(path: Any) -> Any:
    """A file to write: on a local disk, or wherever Orbax's paths lead."""
    if _is_local(path):
        return _checkpoint_file.replacing(os.fspath(path))
    return path.open("wb")


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
        if not isinstance(value, jax.Array | np.ndarray):
            continue
        if value.dtype != jnp.int32 or value.shape != TOKEN_SHAPE:
            continue
        local = value.addressable_shards[0].data if isinstance(value, jax.Array) else value
        folder, name = info.parent_dir / FOLDER, _name(tuple(np.asarray(local).tolist()))
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
        shutil.copyfileobj(source, target)
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
