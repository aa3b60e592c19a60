"""Times saving and loading of moments next to the disk's own rate, and next to Orbax with arrays.

    python benchmarks/checkpoint.py [--gigabytes 4] [--folder FOLDER]

The state is that of `scale_by_paged_adam8bit` for bfloat16 gradients. Rates are bytes of the state
divided by seconds. The disk's are those of one plain file of the same size in the same folder,
written and synced, or read after its pages were dropped from memory, in the same run. "Orbax,
arrays" saves the same codes and scales as JAX arrays. Loading is `load_moments` and the first
update, less the time of an ordinary update. Host memory is what the process takes on top of what it
had before, at its peak, in units of the state. At the end the restored state and the original have
each made a step, and are compared.
"""

import argparse
import contextlib
import json
import os
import shutil
import struct
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

import paged_optax

LEAF = (16384, 4096)  # 64 Mi parameters, 130 MiB of moments
CHUNK = 64 * 2**20


class Measured:
    """Seconds of a block, and the most host memory that it took."""

    def __enter__(self):
        self._ended, self.peak = threading.Event(), 0
        self._before = _resident()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        self._start = time.perf_counter()
        return self

    def _watch(self):
        while not self._ended.wait(0.002):
            self.peak = max(self.peak, _resident() - self._before)

    def __exit__(self, *error):
        self.seconds = time.perf_counter() - self._start
        self._ended.set()
        self._thread.join()


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def drop_pages(path: Path) -> None:
    """Has the next read of a file, or of all files in a folder, come from the disk."""
    for name in [path, *path.rglob("*")] if path.is_dir() else [path]:
        if name.is_file():
            with open(name, "rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def time_disk(path: Path, nbytes: int) -> tuple[Measured, Measured]:
    """One plain file, written and read."""
    chunk = np.random.default_rng(0).bytes(CHUNK)
    with Measured() as writing:
        with open(path, "wb") as file:
            for _ in range(nbytes // CHUNK):
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
    drop_pages(path)
    buffer = bytearray(CHUNK)
    with Measured() as reading, open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    path.unlink()
    return writing, reading


def checksums(path: Path) -> bytes:
    """Those of the arrays in a file of moments, without that of its header."""
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        begin, end = json.loads(file.read(length))["crc32"]["data_offsets"]
        file.seek(8 + length + begin + 4)
        return file.read(end - begin - 4)


def gpu_memory(state) -> list[tuple[int | None, int]]:
    """Free device memory and resident bytes of moments, device by device."""
    devices = paged_optax.memory_report(state).devices
    return [(device.free, device.resident) for device in devices]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=4.0, help="size of the state")
    parser.add_argument("--folder", help="on the disk to measure (default: a temporary one)")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        run(folder, max(1, round(args.gigabytes * 1e9 / (np.prod(LEAF) * 2.03125))))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run(folder: Path, num_leaves: int) -> None:
    tx = paged_optax.scale_by_paged_adam8bit()
    update = jax.jit(tx.update, donate_argnums=0)
    shapes: Any = [jax.ShapeDtypeStruct(LEAF, jnp.bfloat16)] * num_leaves

    @jax.jit
    def make_grads():
        keys = jax.random.split(jax.random.key(0), num_leaves)
        return [jax.random.normal(key, LEAF, jnp.bfloat16) for key in keys]

    def advance(state):
        grads = jax.block_until_ready(make_grads())
        start = time.perf_counter()
        _, state = update(grads, state)
        jax.block_until_ready(state)
        return state, time.perf_counter() - start

    state, _ = advance(tx.init(shapes))
    state, step = advance(state)
    before = gpu_memory(state)
    path, rows = folder / "m.safetensors", {}
    with Measured() as saving:
        nbytes = paged_optax.save_moments(state, path)
    after = gpu_memory(state)
    drop_pages(path)
    writing, reading = time_disk(folder / "plain", nbytes)
    rows["one plain file"] = writing, reading
    with contextlib.closing(ocp.StandardCheckpointer()) as checkpointer:
        with Measured() as with_orbax:
            checkpointer.save(folder / "paged", {"state": state})
            checkpointer.wait_until_finished()
        shutil.rmtree(folder / "paged")
        arrays = paged_optax.export_moments(state)
        arrays = {name: jnp.asarray(arrays.pop(name)) for name in list(arrays)}
        jax.block_until_ready(arrays)
        with Measured() as as_arrays:
            checkpointer.save(folder / "arrays", arrays)
            checkpointer.wait_until_finished()
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, arrays)
        del arrays
        drop_pages(folder / "arrays")
        with Measured() as from_arrays:
            jax.block_until_ready(checkpointer.restore(folder / "arrays", target))
        shutil.rmtree(folder / "arrays")
    state, _ = advance(state)
    paged_optax.save_moments(state, folder / "expected.safetensors")
    paged_optax.release(state)
    drop_pages(path)
    grads = jax.block_until_ready(make_grads())
    with Measured() as loading:
        state = paged_optax.load_moments(tx.init(shapes), path)
        _, state = update(grads, state)
        jax.block_until_ready(state)
    # The moments themselves are in host memory too, unless they are in that of a GPU.
    loading.seconds -= step
    rows["save_moments, load_moments"] = saving, loading
    rows["Orbax, paged moments"] = with_orbax, None
    rows["Orbax, arrays"] = as_arrays, from_arrays
    paged_optax.save_moments(state, folder / "actual.safetensors")
    same = checksums(folder / "expected.safetensors") == checksums(folder / "actual.safetensors")
    show(rows, nbytes)
    print(f"restored and stepped, moments are {'the same' if same else 'OTHERS'}")
    print(f"free and resident bytes of devices: {before} before saving, {after} after")
    if not same:
        raise SystemExit(1)


def show(rows, nbytes: int) -> None:
    print(f"state of {nbytes / 1e9:.2f} GB on {jax.devices()[0].device_kind}")
    print(f"{'':<28}{'save GB/s':>11}{'of disk':>9}{'memory':>8}{'load GB/s':>11}{'of disk':>9}"
          f"{'memory':>8}")  # fmt: skip
    disk = rows["one plain file"]
    for name, pair in rows.items():
        line = f"{name:<28}"
        for measured, plain, width in zip(pair, disk, (11, 11), strict=True):
            if measured is None:
                line += f"{'-':>{width}}{'-':>9}{'-':>8}"
                continue
            rate, share = nbytes / 1e9 / measured.seconds, plain.seconds / measured.seconds
            line += f"{rate:>{width}.2f}{share:>9.2f}{measured.peak / nbytes:>8.2f}"
        print(line)


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        main()
