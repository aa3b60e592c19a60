"""Saving and loading moments explicitly: to files, to arrays, and to and from optax."""

import contextlib
import glob
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from . import _arrays, _checkpoint_file
from ._contents import Contents, FilePart, merge
from ._log import log, named, told
from ._metadata import entries_of
from ._part_file import replacing
from ._refused import tell_refusals
from ._replace import replace_moments
from ._state import find_states, read_count, read_token
from ._transfer import all_opened


def save_moments(opt_state: Any, path: str | os.PathLike[str]) -> int:
    """Writes the moments of an optimizer state to a file.

    Use it where the format of your checkpoints does not carry moments by itself. Pickle, flax and
    Orbax do: see docs/checkpoints.md. The file is in the safetensors format, and has the moments as
    they are stored, with checksums. It is written next to `path`, synced, and renamed, so that a
    process which is killed leaves the file that was there. It takes the place of that one when this
    function returns.

    Several threads read, sum and write at once, past the page cache where the file system can. The
    file that a process left which was killed while it wrote goes with the next save.

    Waits for the updates under way. Updates of these states that start meanwhile wait for it; those
    of other states go on. Takes no memory of the GPU and moves no moments. The host needs memory
    for 64 MiB of them.

    With several processes (`jax.distributed`) each must make this call. Each writes the moments
    that are on its own devices, to `path` with ``-00001-of-00004`` before its suffix. Files of
    another number of processes stay. Delete them before `load_moments`, which refuses to choose.

    Args:
      opt_state: any optax state, nnx.Optimizer or TrainState with paged states in it: the newest.
      path: the file to write.

    Returns:
      The number of bytes written.

    Raises:
      ValueError: if there is no paged state; if the path is a URL such as ``gs://...``; if a part
        of the state was loaded from this file and was not updated since.
      RuntimeError: if the state is not the newest one, or was released, or is not in this process.
      NotImplementedError: if it is not known which part of the parameters each device has.
      OSError: if the file cannot be written.

    Example:
      >>> import os, tempfile, jax.numpy as jnp, paged_optax
      >>> tx = paged_optax.scale_by_paged_adam8bit()
      >>> params = {"w": jnp.ones((64, 64))}
      >>> _, state = tx.update(params, tx.init(params))
      >>> path = os.path.join(tempfile.mkdtemp(), "moments.safetensors")
      >>> print(paged_optax.save_moments(state, path) < 3 * 64 * 64)
      True
      >>> state = paged_optax.load_moments(tx.init(params), path)
      >>> _, state = tx.update(params, state)
      >>> print(state.count)
      2
    """
    path = _local_path(path)
    if jax.process_count() > 1:
        path = _path_of(path, jax.process_index(), jax.process_count())
    with named("save_moments"):
        with _opened(opt_state) as (contents, tokens):
            if _is_in(path, contents):
                return os.path.getsize(path)
            with replacing(path) as part:
                about = {"processes": jax.process_count(), "tokens": tokens}
                nbytes = _checkpoint_file.write(part, contents, **about)
        return told("save_moments wrote %s to %s", nbytes, path)


def load_moments(opt_state: Any, path: str | os.PathLike[str], *, convert: bool = False) -> Any:
    """An optimizer state with the moments, and the count, of a file of `save_moments`.

    Nothing but the file's header is read at once. The first update that takes the state makes the
    moments' memory, compares them with its gradients, and reads the file, which must stay where it
    is until then.

    The devices may be others than those that saved, and more or fewer. Blocks of 256 elements that
    coincide keep every bit: always on one device, and for replicated leaves, and where leaves are
    cut along their first dimension into whole blocks. Others go through float32 once.

    Args:
      opt_state: what `init` returned, or another state of this optimizer. Only its structure
        matters, so ``jax.eval_shape(tx.init, params)`` will do. Do not use it any more.
      path: what was passed to `save_moments`, in however many processes.
      convert: whether moments in another format (`Quantization`), or without the residuals of
        compensated parameters, are accepted. They are then rounded, to nearest.

    Returns:
      `opt_state` with other tokens and counts.

    Raises:
      ValueError: if the file is damaged or of a newer version of the library; if a file of another
        process is missing; if there are files of several numbers of processes; if there is
        another number of paged states; if the path is a URL such as ``gs://...``. From the first
        update (there also JaxRuntimeError): if names, shapes or formats differ, or checksums are
        wrong.
      OSError: if the file cannot be read.

    Example:
      >>> import os, tempfile, jax.numpy as jnp, paged_optax
      >>> tx = paged_optax.scale_by_paged_adam8bit()
      >>> params = {"w": jnp.ones((64, 64))}
      >>> _, state = tx.update(params, tx.init(params))
      >>> path = os.path.join(tempfile.mkdtemp(), "moments.safetensors")
      >>> nbytes = paged_optax.save_moments(state, path)
      >>> state = paged_optax.load_moments(tx.init(params), path)  # in whatever process
      >>> print(state.count)
      1
    """
    with named("load_moments"):
        state = replace_moments(opt_state, _read_files(_local_path(path)), convert=convert)
    log.info("load_moments found the moments in %s; the first update reads them", path)
    return state


def export_moments(opt_state: Any) -> dict[str, np.ndarray]:
    """The moments of an optimizer state as they are stored, in a flat dict of NumPy arrays.

    For formats of your own: `numpy.savez`, msgpack, another checkpoint library. Names are those of
    the tensors in a file of `save_moments`. The result is a copy in host memory, and takes as much
    of it as the moments do. Of several processes each gets the moments that are on its own devices.

    Args:
      opt_state: any optax state, nnx.Optimizer or TrainState with paged states in it: the newest.

    Returns:
      Arrays of uint8, uint16 (the bits of bfloat16), uint32 and float32 by name.

    Raises:
      As `save_moments`, without OSError.

    Example:
      >>> import jax.numpy as jnp, paged_optax
      >>> tx = paged_optax.scale_by_paged_adam8bit()
      >>> params = {"w": jnp.ones((64, 64))}
      >>> _, state = tx.update(params, tx.init(params))
      >>> arrays = paged_optax.export_moments(state)
      >>> print(arrays["0.0['w'].0.mu"].shape, arrays["0.0['w'].0.mu"].dtype)
      (64, 64) uint8
      >>> state = paged_optax.import_moments(tx.init(params), arrays)
    """
    with named("export_moments"), _opened(opt_state) as (contents, _):
        return _arrays.to_arrays(contents)


def import_moments(opt_state: Any, arrays: Mapping[str, Any], *, convert: bool = False) -> Any:
    """An optimizer state with the moments, and the count, that `export_moments` returned.

    The first update that takes the state makes the moments' memory, compares them with its
    gradients, and copies the arrays. They are kept until then and must not change.

    Args:
      opt_state: what `init` returned, or another state of this optimizer. Only its structure
        matters. Do not use it any more.
      arrays: as `export_moments` returned them: dtypes, shapes and names.
      convert: as in `load_moments`.

    Returns:
      `opt_state` with other tokens and counts.

    Raises:
      ValueError: if arrays are missing or of another dtype or shape, or come from a newer version
        of the library; if there is another number of paged states; and from the first update as in
        `load_moments`.

    Example:
      >>> import jax.numpy as jnp, paged_optax
      >>> tx = paged_optax.scale_by_paged_adam8bit()
      >>> params = {"w": jnp.ones((64, 64))}
      >>> _, state = tx.update(params, tx.init(params))
      >>> arrays = paged_optax.export_moments(state)
      >>> state = paged_optax.import_moments(tx.init(params), arrays)
      >>> _, state = tx.update(params, state)
      >>> print(state.count)
      2
    """
    states, _ = _arrays.from_arrays(arrays)
    return replace_moments(
        opt_state, [state and merge([state]) for state in states], convert=convert
    )


# --- What the functions have in common -----------------------------------------------------------


@contextlib.contextmanager
def _opened(opt_state: Any) -> Iterator[tuple[list[Contents | None], list[tuple[int, int]]]]:
    """The contents of all paged states, to be read until the context ends, and their tokens.

    In an nnx.Optimizer another thread may put newer states meanwhile. So each is looked at once,
    all of it, before anything is waited for.
    """
    states = find_states(opt_state)
    leaves = [jax.tree.leaves(state.count) for state in states]  # out of an nnx.Variable
    tokens = [read_token(state) for state in states]
    tell_refusals()
    counts = [read_count(count) for count in leaves]
    with all_opened([state.token for state in states], counts) as contents:
        yield contents, tokens


def _is_in(path: str, states: list[Contents | None]) -> bool:
    """Whether a file is what all states still wait to be read from.

    Raises:
      ValueError: if that is so of a part of them: another file in its place would be read instead.
    """
    parts = [
        entry.contents.data(entry.leaf, entry.box, entry.field.name) for entry in entries_of(states)
    ]
    old = [
        isinstance(part, FilePart) and os.path.realpath(part.path) == os.path.realpath(path)
        for part in parts
    ]
    if any(old) and not (all(old) and all(states)):
        raise ValueError(
            f"a part of this optimizer state has not been read yet from {path}, which would be"
            " replaced. Save to another path, or after the next update"
        )
    return any(old)


def _local_path(path: str | os.PathLike[str]) -> str:
    """The path as text; refuses one of other storage, which `open` would look for in a folder."""
    text = os.fspath(path)
    if "://" in text:
        raise ValueError(
            f"{text} is not in a local file system, and moments are written to local files. Save to"
            " a local path and copy the file (fsspec and etils.epath do that), or save the state"
            " with Orbax, which takes moments along to wherever its checkpoints are"
        )
    return text


def _path_of(path: str, process: int, num_processes: int) -> str:
    """The file of one process of several."""
    stem, suffix = os.path.splitext(path)
    return f"{stem}-{process + 1:05d}-of-{num_processes:05d}{suffix}"


def _read_files(path: str) -> list[Contents | None]:
    """The states in the file at `path`, or in those of all processes that were given this path."""
    saves = _find_saves(path)
    if len(saves) > 1:
        raise ValueError(
            f"jobs of {len(saves)} different numbers of processes saved moments to {path}:"
            f" {_listed(saves)}. The newest are {_listed(saves[-1:])}. Delete those that you do not"
            " want, or move them elsewhere"
        )
    names = saves[0] if saves else [path]
    if names != [path]:
        return merge_files(names)
    states, _ = _checkpoint_file.read(path)
    return [state and merge([state]) for state in states]


def _find_saves(path: str) -> list[list[str]]:
    """The files of each number of processes that saved to `path`, the newest last."""
    saves = {"": [path]} if os.path.exists(path) else {}
    stem, suffix = os.path.splitext(path)
    for name in sorted(glob.glob(f"{glob.escape(stem)}-*{glob.escape(suffix)}")):
        found = re.fullmatch(r"-\d{5}-of-(\d{5})", name[len(stem) : len(name) - len(suffix)])
        if found:
            saves.setdefault(found[1], []).append(name)
    return sorted(saves.values(), key=lambda names: max(map(_time_of, names)))


def _time_of(path: str) -> int:
    """When a file was written, in ns."""
    return os.stat(path).st_mtime_ns


def _listed(saves: list[list[str]]) -> str:
    return ", ".join(
        names[0] if len(names) == 1 else f"{names[0]} to {os.path.basename(names[-1])}"
        for names in saves
    )


def merge_files(paths: list[str]) -> list[Contents | None]:
    """The states in the files that the processes of one job wrote, each state once.

    Raises:
      ValueError: if they do not belong together, or one is missing.
    """
    files = [_checkpoint_file.read(path) for path in paths]
    first, about = files[0]
    if any(other != about or len(states) != len(first) for states, other in files):
        raise ValueError(f"{paths[0]} and the files next to it are not of one checkpoint")
    if about.get("processes") != len(files):
        raise ValueError(
            f"{len(files)} of the {about.get('processes')} files of a checkpoint are at {paths[0]}"
        )
    merged = []
    for parts in zip(*(states for states, _ in files), strict=True):
        present = [part for part in parts if part is not None]
        if present and len(present) != len(parts):
            raise ValueError(f"{paths[0]} and the files next to it are not of one checkpoint")
        merged.append(merge(present) if present else None)
    return merged
