"""What several test files need, and all that tests know of the private modules of `paged_optax`.

No other file of tests imports a private module, so a change inside the package changes this file
alone. Importing it starts no JAX backend.
"""

import contextlib
import dataclasses
import functools
import os
import subprocess
import sys
import textwrap
from collections import OrderedDict
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from jax.interpreters import mlir

from paged_optax import (
    Quantization,
    StateRefused,
    _ext,
    _ffi,
    _job,
    _names,
    _process,
    _state,
    _tables,
    _testing,
    memory_report,
    moments,
    release,
    release_all,  # noqa: F401
)

# The names that only tests use, which F401 cannot know.
from paged_optax import _ext as ext  # noqa: F401
from paged_optax import _orbax as orbax_hook  # noqa: F401
from paged_optax import _part_file as part_file  # noqa: F401
from paged_optax import _reference as reference
from paged_optax import _tables as tables  # noqa: F401
from paged_optax import _testing as hooks  # noqa: F401  functions of C++ for tests alone
from paged_optax._bytes import parse_bytes  # noqa: F401
from paged_optax._clip import _origins as clip_origins  # noqa: F401
from paged_optax._forecast import kept_by  # noqa: F401
from paged_optax._muon import momentum as muon_momentum  # noqa: F401
from paged_optax._names import leaf_keys  # noqa: F401
from paged_optax._non_finite import count_bad, count_elements  # noqa: F401
from paged_optax._options import make_options  # noqa: F401
from paged_optax._rule import Rule  # noqa: F401
from paged_optax._shards import Shards, cuts_of  # noqa: F401
from paged_optax._state import Token, find_states, new_token  # noqa: F401
from paged_optax._step import make_step, part_of  # noqa: F401

# Fixtures of conftest.py, as marks.
on_every_device = pytest.mark.usefixtures("device")
on_cpu = pytest.mark.usefixtures("on_cpu")
as_users_have_it = pytest.mark.usefixtures("standard_promotion")

f32 = np.float32
BLOCK = 256  # elements
DTYPES = {  # in the order of enum DType
    "float32": f32,
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
}
FORMATS = {name: i for i, name in enumerate(_tables.FORMAT_NAMES)}  # the extension's numbers
RULES = {rule["name"]: i for i, rule in enumerate(_tables.RULES)}
QUANTIZED = ["dynamic", "ratio"]  # the formats of 8 bits
ALL_QUANTIZED = Quantization(min_size=0)
FLOAT32_MOMENTS = Quantization(min_size=2**62)

# A step that the extension refuses raises JaxRuntimeError, or ValueError on the fast path of a
# jitted function.
RAISES = (RuntimeError, ValueError)


# --- Comparisons --------------------------------------------------------------------------------


def without_free(report):
    """A memory report without what is free on the devices: other programs may take of that."""
    devices = tuple(dataclasses.replace(device, free=None) for device in report.devices)
    return dataclasses.replace(report, devices=devices)


def assert_trees_equal(actual, desired):
    """Equal trees of equal arrays; any NaN equals any NaN."""
    assert jax.tree.structure(actual) == jax.tree.structure(desired)
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), actual, desired
    )


def assert_trees_close(actual, desired, *, rtol=1e-5, atol=1e-6, **halves):
    """Equal trees of arrays that are close, random keys included.

    Args:
      actual, desired: the trees.
      rtol, atol: as in `np.testing.assert_allclose`.
      **halves: arguments of `assert_close_ulps` for leaves of 16 bits; without, these have to be as
        close as the others.
    """
    assert jax.tree.structure(actual) == jax.tree.structure(desired)

    def check(one, other):
        if jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
            one, other = jax.random.key_data(one), jax.random.key_data(other)
        if halves and one.dtype.itemsize == 2:
            assert_close_ulps(one, other, **halves)
        else:
            np.testing.assert_allclose(_wide(one), _wide(other), rtol=rtol, atol=atol)

    jax.tree.map(check, actual, desired)


def _wide(array):
    array = np.asarray(array)
    return array if np.iscomplexobj(array) else array.astype(np.float64)


def assert_close_ulps(actual, desired, ulps, term=0.0, term_ulps=0):
    """Equal trees of arrays up to units in the last place of their dtypes.

    For results of 16 bits that XLA computes. Two programs may fuse the same operations otherwise,
    and then round otherwise between them; on a CPU with AVX512-FP16, ``a * b + c`` is rounded once.
    A rounding changes a result by half a unit at most. Products and quotients keep that as a
    relative error, which is at most a unit of the last result. So what took k roundings differs by
    at most 2 k units between two programs. A sum of two terms is rounded once: by at most half a
    unit of its own in each program, and it takes over the differences of its terms. Parameters that
    agreed before n steps thus differ by n of their own units, and n times as much as an update.

    Args:
      actual, desired: trees of arrays of the same dtypes.
      ulps: how many of their own units they may differ by.
      term: the largest magnitude of a term that was added.
      term_ulps: how many units of that magnitude they may differ by, besides.
    """
    assert jax.tree.structure(actual) == jax.tree.structure(desired)

    def check(one, other):
        one, other = np.asarray(one), np.asarray(other)
        assert one.dtype == other.dtype and one.shape == other.shape
        info = jnp.finfo(one.dtype)

        def unit(x):
            x = np.maximum(np.abs(x), float(info.smallest_normal))
            return float(info.eps) * 2.0 ** np.floor(np.log2(x))

        one, other = one.astype(np.float64), other.astype(np.float64)
        difference = np.abs(one - other)
        bound = ulps * np.maximum(unit(one), unit(other)) + term_ulps * unit(term)
        assert np.all(difference <= bound), f"by {np.nanmax(difference / bound):.3g} of the bound"

    jax.tree.map(check, actual, desired)


def same_bits(actual, expected, what=""):
    """One dtype, one shape and the same bits; all NaNs count as one, as IEEE 754 has it."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.dtype == expected.dtype, what
    assert actual.shape == expected.shape, what
    with np.errstate(invalid="ignore"):  # signalling NaNs
        nan, actual_nan = np.isnan(expected), np.isnan(actual)
    bits = [
        np.where(nan, 0, x.reshape(expected.size).view(f"u{x.itemsize}").reshape(x.shape))
        for x in (actual, expected)
    ]
    np.testing.assert_array_equal(actual_nan, nan, what)
    np.testing.assert_array_equal(*bits, what)


# --- Trees and runs -----------------------------------------------------------------------------


def make_tree(seed, shapes, dtypes=f32, *, spread=0.0, scale=1.0):
    """Normal random NumPy arrays.

    Args:
      seed: of the random numbers.
      shapes: shapes by name.
      dtypes: one for all, or dtypes by name.
      spread: elements differ by e to the power of this, typically.
      scale: factor of all elements.
    """
    rng = np.random.default_rng(seed)
    tree = {}
    for name, shape in shapes.items():
        leaf = np.asarray(scale * rng.standard_normal(shape))
        if spread:
            leaf = leaf * np.exp(rng.normal(0, spread, shape))
        tree[name] = leaf.astype(dtypes[name] if isinstance(dtypes, dict) else dtypes)
    return tree


def to_jax(tree):
    return jax.tree.map(jnp.asarray, tree)


def stack(trees):
    """One tree of leaves that are stacked along a new first axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def is_zero(tree):
    return not any(np.any(leaf) for leaf in jax.tree.leaves(tree))


def train(tx, params, grads, update=None):
    """Parameters and state after one step for each tree of gradients; jitted by default."""
    update = jax.jit(tx.update) if update is None else update
    state = tx.init(params)
    for grad in grads:
        updates, state = update(grad, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def assert_found_and_freed(container, num_bytes):
    """The functions that take a state find it in `container`."""
    assert memory_report(container).total >= num_bytes
    assert release(container) >= num_bytes
    with pytest.raises(RuntimeError, match="released"):
        moments(container)


def run_python(code, folder, *arguments, options=(), check=True, **environment):
    """Runs code in a process of its own, which can import this file too.

    Args:
      code: Python, may be indented.
      folder: where it runs. No checkout, whose source folder would be imported.
      *arguments: its `sys.argv[1:]`.
      options: of the interpreter.
      check: whether the process must succeed.
      **environment: changes the environment, where JAX_PLATFORMS is "cpu"; None removes a variable.

    Returns:
      The finished process, with its output as text.
    """
    path = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(path)} | environment
    process = subprocess.run(
        [sys.executable, *options, "-c", textwrap.dedent(code), *map(str, arguments)],
        cwd=folder,
        env={k: v for k, v in {**os.environ, **environment}.items() if v is not None},
        capture_output=True,
        text=True,
        timeout=3600,  # ends a process that hangs, and none that is slow
    )
    assert not check or process.returncode == 0, process.stdout + process.stderr
    return process


def let_cpu_build_compile_for_gpus():
    """Programs for GPUs can be compiled, and not run, also where the build has no CUDA code."""
    if _ext.build_info()["cuda"]:
        return
    for name, _, handler in _ext.targets():
        jax.ffi.register_ffi_target(name, handler, platform="CUDA")
    mlir.register_lowering(_ffi.issue_call_p, _ffi._lower_issue, platform="cuda")
    mlir.register_lowering(_ffi.update_call_p, _ffi._lower_update, platform="cuda")
    mlir.register_lowering(_ffi.load_call_p, _ffi._lower_load, platform="cuda")
    mlir.register_lowering(_ffi.store_call_p, _ffi._lower_store, platform="cuda")
    mlir.register_lowering(_ffi.norm_call_p, _ffi._lower_norm, platform="cuda")


# --- What is stored -----------------------------------------------------------------------------


def token_of(state):
    """Handle and version of a state, once its step is done on every device."""
    (state,) = _state.find_states(state)
    return _state.read_token(state)


def _read(state, read):
    """`read(platform, ordinal, handle, version)` of a state on one device."""
    handle, version = token_of(state)
    (report,) = _ext.describe(handle, version)
    return read(report["platform"], report["ordinal"], handle, version)


def stored_leaves(state):
    """What a state on one device stores, leaf by leaf, padding included.

    A leaf is ``(mu, nu)`` in float32, or ``(mu codes, nu codes, mu scales, nu scales)``; with other
    states accordingly.
    """
    return _read(state, _ext.read_leaves)


def residuals_of(state, index):
    """Residuals of the 16-bit parameters of a leaf, uint8, padding included."""
    return _read(state, _ext.read_residuals)[index]


def find_state(tree):
    """The only paged state in a tree."""
    (state,) = _state.find_states(tree)
    return state


def leaf_key(name, seed=0):
    """The key of random bits that the leaf `name` of a flat dict has."""
    return leaf_keys((f"['{name}']",), seed)[0]


ratio_unit = reference.ratio_unit  # of first moments, from second ones


def _round_up(n, multiple):
    return -(-n // multiple) * multiple


def layout_bytes(num_quantized, num_float32, has_residuals=False, num_states=2):
    """Bytes of an arena by counting, from the description in layout.h; Adam has two states.

    A region starts at a multiple of 512 bytes. A chunk of 2 MiB holds as many multiples of 32 of
    its blocks as fit, and the first one, which the region before may have begun, fewer.
    """
    chunk, end = 2**21, 0
    for blocks, nbytes in ((num_quantized, 260 * num_states), (num_float32, 1024 * num_states)):
        nbytes += BLOCK * has_residuals
        if not blocks:
            continue
        start, most = _round_up(end, 512), chunk // nbytes // 32 * 32
        room = min((chunk - start % chunk) // nbytes, most)
        if blocks <= room:
            end = start + blocks * nbytes
            continue
        room = room // 32 * 32
        if not room:
            start, room = _round_up(start, chunk), most
        full, last = divmod(blocks - room - 1, most) if blocks > room else (-1, blocks - 1)
        first = start if full < 0 else (start // chunk + 1 + full) * chunk
        end = first + (last + 1) * nbytes
    return _round_up(end, 512)


# --- The CPU loop alone -------------------------------------------------------------------------


def arena_bytes(num_quantized, num_float32, has_residuals=False, codec="ratio"):
    """Bytes of an arena of Adam's moments, from the extension."""
    end = 0
    for name, blocks in ((codec, num_quantized), ("float32", num_float32)):
        _, end, _, _ = _testing.region(RULES["adam"], FORMATS[name], blocks, has_residuals, end)
    return _round_up(end, 512)


def make_arena(*states):
    """The bytes of an arena with one leaf's states, written from the description in layout.h.

    States are `reference.Quantized`, or flat float32 arrays of whole blocks.
    """
    quantized = isinstance(states[0], reference.Quantized)
    codes = [state.codes if quantized else state.view(np.uint8) for state in states]
    rows = [x.reshape(-1, BLOCK if quantized else 4 * BLOCK) for x in codes]
    words = [state.scales for state in states] if quantized else []
    nbytes = sum(row.shape[1] for row in rows) + 4 * len(words)
    per_chunk = 2**21 // nbytes // 32 * 32
    arena = bytearray()
    for first in range(0, len(rows[0]), per_chunk):
        part = slice(first, first + per_chunk)
        arena = arena.ljust(_round_up(len(arena), 2**21), b"\0")
        arena += b"".join(row[part].tobytes() for row in rows)
        if words:
            arena += np.stack([word[part] for word in words], axis=1).tobytes()
    return np.frombuffer(arena.ljust(_round_up(len(arena), 512), b"\0"), np.uint8)


def split_arena(arena, num_blocks, codec="ratio"):
    """Codes and float32 words, of first and second moments, of an arena of one chunk."""
    packed = {"ratio6": 192, "ratio4": 128}.get(codec)
    nbytes = 2 * num_blocks * (packed or BLOCK)
    codes = arena[:nbytes].reshape(2, -1)
    if packed:
        codes = unpack_codes(codes.reshape(-1, packed)).reshape(2, -1)
    words = arena[nbytes:][: 8 * num_blocks].view(f32).reshape(num_blocks, 2).T
    return *codes, *np.ascontiguousarray(words)


def unpack_codes(packed):
    """Codes (blocks, 256) from bytes (blocks, 128 or 192), as layout/small_codes.h says."""
    k = np.arange(BLOCK)
    group, place = k // 8, k % 8
    lower = packed[:, 4 * group + place % 4] >> (4 * (place // 4)).astype(np.uint8)
    upper = np.zeros_like(lower)
    if packed.shape[1] > 128:
        pairs = packed[:, 128:].copy().view("<u2").astype(np.int64)
        first_bit = np.array([4, 12, 6, 14, 2, 10, 0, 8])[place]
        upper = pairs[:, group] >> first_bit & 3
    return (lower & 15 | upper << 4).astype(np.uint8)


def step_blocks(
    values, arena, format, ranges, hyperparams, count, *, rule="adam", nesterov=False, **options
):
    """Advances blocks of one leaf by a step, with the CPU loop.

    Args:
      values: gradients, which become updates in place.
      arena: uint8, changes in place.
      format: a name in `FORMATS`.
      ranges: pairs of the first block and the one after the last.
      hyperparams: of the rule; Adam's are b1, b2, eps, eps_root.
      count: steps already taken.
      rule: a name in `RULES`.
      nesterov: Adam's flag.
      **options: ``fresh`` (whether stored moments count as zero), ``leaf_key``.

    Returns:
      The values.
    """
    dtype = list(DTYPES.values()).index(values.dtype.type)
    buffer = values.view(np.uint16) if dtype else values
    for begin, end in ranges:
        _testing.step_leaf(
            RULES[rule],
            buffer,
            dtype,
            FORMATS[format],
            arena,
            begin,
            end,
            list(map(float, hyperparams)),
            count,
            int(nesterov),
            **options,
        )
    return values


# --- The process --------------------------------------------------------------------------------

num_arenas = _testing.num_arenas
num_unused = _ext.num_unused  # handles that were issued and never used
read_leaves, read_residuals = _ext.read_leaves, _ext.read_residuals  # of one device
build_info = _ext.build_info
free_device_bytes = _ext.free_device_bytes
available_host_bytes = _ext.available_host_bytes


def set_available_host_bytes(monkeypatch, nbytes):
    """So much is what Python finds available, until the test ends."""
    monkeypatch.setattr(_ext, "available_host_bytes", lambda: nbytes)


def share_base_of(monkeypatch, client):
    """Agrees on handles as in a job with this client. Returns the bases that were set."""
    bases = []
    monkeypatch.setattr(_ext, "set_shared_base", bases.append)
    monkeypatch.setattr(_job.distributed.global_state, "client", client)
    _job.share_base()
    _job.share_base()
    return bases


def raise_if_refused():
    """Raises if a step was refused and nobody was told."""
    _testing.raise_if_refused()


def forget_refusals():
    """As if somebody had been told of each step that was refused."""
    while _ext.any_refused():
        with contextlib.suppress(StateRefused):
            raise_if_refused()


def finish(result):
    """Waits, and raises if a step was refused, as the next program that gets the state does."""
    jax.block_until_ready(result)
    raise_if_refused()
    return result


def forget_notices(monkeypatch):
    """Every notice counts as new, until the test ends."""
    monkeypatch.setattr(_process, "_said", set())


def notices_are_about(monkeypatch, device):
    """Notices of short memory are about devices of this kind, until the test ends."""
    platform = "cpu" if device.platform == "cpu" else "cuda"
    monkeypatch.setattr(_process, "_platform", platform)


def limit_trees(monkeypatch, count):
    """Remembers the trees of `count` models, until the test ends. Returns those remembered."""
    monkeypatch.setattr(_names, "trees", OrderedDict())
    monkeypatch.setattr(_names, "MAX_TREES", count)
    return _names.trees


def record_readings(monkeypatch):
    """A list that gets the names of what is called to look at states, until the test ends."""
    calls = []
    for name in ("describe", "read_leaves"):
        function = getattr(_ext, name)
        monkeypatch.setattr(
            _ext, name, lambda *args, f=function, n=name: calls.append(n) or f(*args)
        )
    return calls


@functools.cache
def why_no_gpu() -> str:
    """What keeps tests from a GPU here; empty where nothing does."""
    try:
        jax.devices("gpu")
    except RuntimeError:
        return "JAX sees no NVIDIA GPU"
    return "" if build_info()["cuda"] else "paged_optax was built without CUDA"


def arrays_on_cpu():
    """Context in which new arrays are made on the first CPU device; it holds for one thread."""
    return jax.default_device(jax.devices("cpu")[0])


def resident_set():
    """Bytes of memory that this process has; needs Linux."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
