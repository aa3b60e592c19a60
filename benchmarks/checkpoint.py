"""Times saving and loading of moments next to the disk's own rate, and next to Orbax with arrays.

    python benchmarks/checkpoint.py [--gigabytes 4] [--folder FOLDER] [--rounds 3] [--no-orbax]

The state is that of `scale_by_paged_adam8bit` for bfloat16 gradients. Rates are bytes of the state
divided by seconds. The disk's are those of one plain file of the same size in the same folder,
written and synced as by ``dd conv=fsync``, or read after its pages were dropped from memory, just
before each save or load. Rates are those of the fastest of several rounds, since the machine may be
busy in others; next to the share of the disk's rate is the range of the shares within one round.
"Orbax, arrays" saves the same codes and scales as JAX arrays, once. Loading is `load_moments` and
an update that is skipped, since it has a NaN: it reads the file into new memory and does no more;
less the time of another one.
Host memory is what the process takes on top of what it had before, at its peak, in units of the
state. At the end the restored state and the original have each made a step, and are compared.
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


def time_writing(path: Path, nbytes: int) -> Measured:
    """One plain file."""
    chunk = np.random.default_rng(0).bytes(CHUNK)
    with Measured() as writing:
        with open(path, "wb") as file:
            for _ in range(nbytes // CHUNK):
                file.write(chunk)
            file.write(chunk[: nbytes % CHUNK])
            file.flush()
            os.fsync(file.fileno())
    return writing


def time_reading(path: Path) -> Measured:
    """The same file."""
    drop_pages(path)
    buffer = bytearray(CHUNK)
    with Measured() as reading, open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return reading


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
    parser.add_argument("--rounds", type=int, default=3, help="how often to save and to load")
    parser.add_argument("--orbax", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    num_leaves = max(1, round(args.gigabytes * 1e9 / (np.prod(LEAF) * 2.03125)))
    try:
        Run(folder, num_leaves, args.rounds).run(args.orbax)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Run:
    """A state, and what was measured with it."""

    def __init__(self, folder: Path, num_leaves: int, rounds: int):
        self.folder, self.rounds = folder, range(rounds)
        self.tx = paged_optax.scale_by_paged_adam8bit(non_finite="skip_step")
        self.update = jax.jit(self.tx.update, donate_argnums=0)
        self.shapes: Any = [jax.ShapeDtypeStruct(LEAF, jnp.bfloat16)] * num_leaves
        # Of each row: (measured, the plain file's) of every round, for saving and for loading.
        self.rows: dict[str, tuple[list[Any], list[Any]]] = {}

        @jax.jit
        def make_grads():
            """Numbers of no pattern between -0.5 and 0.5, which take less time than random ones."""
            place = jax.lax.iota(jnp.uint32, int(np.prod(LEAF)))
            mixed = [(place + np.uint32(i)) * np.uint32(2654435761) for i in range(num_leaves)]
            floats = [(m ^ (m >> 15)).astype(jnp.float32) * 2.0**-32 - 0.5 for m in mixed]
            return [x.astype(jnp.bfloat16).reshape(LEAF) for x in floats]

        self.make_grads = make_grads
        self.make_nans = jax.jit(lambda: [jnp.full(LEAF, jnp.nan, jnp.bfloat16)] * num_leaves)

    def advance(self, state, skip: bool = False):
        grads = jax.block_until_ready(self.make_nans() if skip else self.make_grads())
        start = time.perf_counter()
        _, state = self.update(grads, state)
        jax.block_until_ready(state)
        return state, time.perf_counter() - start

    def run(self, with_orbax: bool) -> None:
        state, _ = self.advance(self.tx.init(self.shapes))
        state, _ = self.advance(state)
        path, plain = self.folder / "m.safetensors", self.folder / "plain"
        saving, loading, writing, reading, skips = [], [], [], [], []
        before = gpu_memory(state)
        nbytes = paged_optax.memory_report(state).total
        for _ in self.rounds:
            path.unlink(missing_ok=True)  # as dd does
            writing.append(time_writing(plain, nbytes))
            with Measured() as measured:
                nbytes = paged_optax.save_moments(state, path)
            saving.append(measured)
        after = gpu_memory(state)
        if with_orbax:
            self.run_orbax(state, writing[-1])
        expected, actual = self.folder / "expected.safetensors", self.folder / "actual.safetensors"
        paged_optax.save_moments(self.advance(state)[0], expected)
        for _ in self.rounds:
            paged_optax.release_all()
            reading.append(time_reading(plain))
            drop_pages(path)
            nans = jax.block_until_ready(self.make_nans())
            with Measured() as measured:
                state = paged_optax.load_moments(self.tx.init(self.shapes), path)
                _, state = self.update(nans, state)
                jax.block_until_ready(state)
            # The moments themselves are in host memory too, unless they are in that of a GPU.
            loading.append(measured)
            state, seconds = self.advance(state, skip=True)
            skips.append(seconds)
        for measured in loading:
            measured.seconds -= min(skips)
        for name, saved, loaded in (
            ("one plain file", writing, reading),
            ("save_moments, load_moments", saving, loading),
        ):
            pairs = zip(saved, writing, strict=True), zip(loaded, reading, strict=True)
            self.rows[name] = list(pairs[0]), list(pairs[1])
        paged_optax.save_moments(self.advance(state)[0], actual)
        same = checksums(expected) == checksums(actual)
        show(self.rows, nbytes)
        print(f"restored and stepped, moments are {'the same' if same else 'OTHERS'}")
        print(f"free and resident bytes of devices: {before} before saving, {after} after")
        if not same:
            raise SystemExit(1)

    def run_orbax(self, state, writing: Measured) -> None:
        """The state by our hook, and the same codes as arrays."""
        folder = self.folder
        with contextlib.closing(ocp.StandardCheckpointer()) as checkpointer:

            def save(name: str, item) -> tuple[Measured, float]:
                with Measured() as measured:
                    checkpointer.save(folder / name, item)
                    returned = time.perf_counter()
                    checkpointer.wait_until_finished()
                return measured, returned - measured._start

            with_hook, hook_returned = save("paged", {"state": state})
            shutil.rmtree(folder / "paged")
            arrays = paged_optax.export_moments(state)
            arrays = {name: jnp.asarray(arrays.pop(name)) for name in list(arrays)}
            jax.block_until_ready(arrays)
            as_arrays, arrays_returned = save("arrays", arrays)
            target = jax.tree.map(ocp.utils.to_shape_dtype_struct, arrays)
            del arrays
            drop_pages(folder / "arrays")
            with Measured() as from_arrays:
                jax.block_until_ready(checkpointer.restore(folder / "arrays", target))
            shutil.rmtree(folder / "arrays")
        self.rows["Orbax, paged moments"] = [(with_hook, writing)], []
        self.rows["Orbax, arrays"] = [(as_arrays, writing)], [(from_arrays, None)]
        print(
            f"seconds until Orbax's save returns, and until the checkpoint is complete: paged"
            f" {hook_returned:.2f} and {with_hook.seconds:.2f}, arrays {arrays_returned:.2f} and"
            f" {as_arrays.seconds:.2f}"
        )


def show(rows, nbytes: int) -> None:
    print(f"state of {nbytes / 1e9:.2f} GB on {jax.devices()[0].device_kind}")
    head = f"{'GB/s':>8}{'of disk':>9}{'(range)':>14}{'memory':>8}"
    print(f"{'':<28}{'save ' + head:>46}{'load ' + head:>46}")
    for name, sides in rows.items():
        print(f"{name:<28}" + "".join(f"{cells(side, nbytes):>46}" for side in sides))


def cells(pairs, nbytes: int) -> str:
    """The best rate, its share of the disk's, the range of that, and the peak of host memory."""
    if not pairs:
        return "-"
    seconds = min(measured.seconds for measured, _ in pairs)
    peak = max(measured.peak for measured, _ in pairs) / nbytes
    cells = f"{nbytes / 1e9 / seconds:>8.2f}"
    if any(plain is None for _, plain in pairs):
        return f"{cells}{'-':>9}{'':>14}{peak:>8.2f}"
    shares = [plain.seconds / measured.seconds for measured, plain in pairs]
    span = f"({min(shares):.2f}-{max(shares):.2f})"
    share = min(plain.seconds for _, plain in pairs) / seconds
    return f"{cells}{share:>9.2f}{span:>14}{peak:>8.2f}"


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        main()
