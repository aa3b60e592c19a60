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
from ._contents import Contents, merge
from ._log import log, named, told
from ._replace import replace_moments
from ._state import find_states, read_count, read_token
from ._transfer import opened


def save_moments(opt_state: Any, path: str | os.PathLike[str]) -> int:
    """Writes the moments of an optimizer state to a file.

    Use it where the format of your checkpoints does not carry moments by itself. Pickle, flax and
    Orbax do: see docs/checkpoints.md. The file is in the safetensors format, and has the moments as
    they are stored, with checksums. It is written next to `path`, synced, and renamed, so that a
    process which is killed leaves the file that was there. It takes the place of that one when this
    function returns.

    Waits for the updates under way, and updates that start meanwhile wait for it. Takes no memory
    of the GPU and moves no moments. The host needs memory for 256 MiB of them, or for one array if
    that is larger.

    With several processes (`jax.distributed`) each must make this call. Each writes the moments
    that are on its own devices, to `path` with ``-00001-of-00004`` before its suffix.

    Args:
      opt_state: any optax state, nnx.Optimizer or TrainState with paged states in it: the newest.
      path: the file to write.

    Returns:
      The number of bytes written.

    Raises:
      ValueError: if there is no paged state.
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
    path = os.fspath(path)
    if jax.process_count() > 1:
        path = _path_of(path, jax.process_index(), jax.process_count())
    with named("save_moments"):
        with _opened(opt_state) as contents, _checkpoint_file.replacing(path) as file:
            about = {"processes": jax.process_count(), "tokens": _tokens(opt_state)}
            nbytes = _checkpoint_file.write(file, contents, **about)
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
        process is missing; if there is another number of paged states. From the first update
        (there also JaxRuntimeError): if names, shapes or formats differ, or checksums are wrong.
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
        state = replace_moments(opt_state, _read_files(os.fspath(path)), convert=convert)
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
    with named("export_moments"), _opened(opt_state) as contents:
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
def _opened(opt_state: Any) -> Iterator[list[Contents | None]]:
    """The contents of all paged states, which can be read until the context ends."""
    states = find_states(opt_state)
    for state in states:  # before any is opened: a step that one waits for may update another
        read_token(state)
    counts = [read_count(state.count) for state in states]
    with contextlib.ExitStack() as stack:
        pairs = zip(states, counts, strict=True)
        yield [stack.enter_context(opened(state.token, count)) for state, count in pairs]


def _tokens(opt_state: Any) -> list[tuple[int, int]]:
    return [read_token(state) for state in find_states(opt_state)]


def _path_of(path: str, process: int, num_processes: int) -> str:
    """The file of one process of several."""
    stem, suffix = os.path.splitext(path)
    return f"{stem}-{process + 1:05d}-of-{num_processes:05d}{suffix}"


def _read_files(path: str) -> list[Contents | None]:
    """The states in the file at `path`, or in those of all processes that were given this path."""
    if os.path.exists(path):
        states, _ = _checkpoint_file.read(path)
        return [state and merge([state]) for state in states]
    stem, suffix = os.path.splitext(path)
    found = [
        name
        for name in sorted(glob.glob(f"{glob.escape(stem)}-*{glob.escape(suffix)}"))
        if re.fullmatch(r"-\d{5}-of-\d{5}", name[len(stem) : len(name) - len(suffix)])
    ]
    return merge_files(found or [path])


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
