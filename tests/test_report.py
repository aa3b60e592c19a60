"""`memory_report`, `moments` and `release`: exact numbers, the table, and no memory left behind."""

import gc
import os
import resource
from collections import OrderedDict

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from paged_optax import (
    DeviceMemory,
    MemoryReport,
    Paging,
    Quantization,
    _ext,
    _names,
    memory_report,
    moments,
    paged_adam8bit,
    release,
    scale_by_paged_adam8bit,
)


@pytest.fixture(autouse=True)
def on_cpu():
    """A GPU rounds what it gives up to whole pages: test_gpu.py."""
    with jax.default_device(jax.devices("cpu")[0]):
        yield


def update_once(params, **options):
    tx = scale_by_paged_adam8bit(**options)
    return tx.update(params, tx.init(params))[1]


def stored_bytes(*sizes, min_size=4096):
    """From xla_ffi/README.md: 2 MiB chunks of whole blocks, 8-bit blocks first."""
    small = [size for size in sizes if size < min_size]
    large = [size for size in sizes if size >= min_size]
    num_8bit, num_float32 = (sum(-(-size // 256) for size in group) for group in (large, small))
    chunk = 2**21
    full, rest = divmod(num_8bit, chunk // 520)  # a block: 256 codes and a scale, twice
    multiple = 2048 if num_float32 else 512
    return full * chunk + -(-rest * 520 // multiple) * multiple + num_float32 * 256 * 8


SHAPES = {
    "one 8-bit leaf": [(64, 256)],
    "first size in 8 bits": [(4096,)],
    "last size in float32": [(4095,)],
    "partial block": [(4097,)],
    "scalar": [()],
    "empty leaf": [(0, 3), (64, 64)],
    "small and large": [(7,), (64, 80), (300,), (5000,), ()],
    "one chunk": [(4032, 256)],
    "one chunk and a block": [(4032, 256), (16, 256)],
    "chunks": [(3 * 4032 + 100, 256)],
    "float32 chunks": [(4000,)] * 80,
}


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_total_is_what_the_layout_needs(shapes):
    state = update_once([jnp.ones(shape) for shape in shapes])
    report = memory_report(state)
    expected = stored_bytes(*(int(np.prod(shape)) for shape in shapes))
    assert report.total == report.resident == expected
    assert report.on_host == 0
    assert release(state) == expected


def test_bytes_per_parameter():
    """Two codes and, for each 256 parameters, two float32 scales."""
    assert memory_report(update_once(jnp.ones(64 * 256))).total / (64 * 256) == 2 + 2 * 4 / 256
    many = 8 * 2**20  # a chunk wastes 512 bytes
    state = update_once(jnp.ones(many))
    assert 2.03125 <= memory_report(state).total / many < 2.032
    assert release(state) / many < 2.032


def test_min_size_decides_what_stays_in_float32():
    sizes = (64, 5120)
    params = [jnp.ones(size) for size in sizes]
    for min_size in (0, 1, 64, 65, 5121):
        state = update_once(params, quantization=Quantization(min_size=min_size))
        assert memory_report(state).total == stored_bytes(*sizes, min_size=min_size)


@pytest.mark.parametrize("paging", [None, Paging(device_bytes=0)], ids=["default", "on the host"])
def test_cpu_has_one_place(paging):
    report = memory_report(update_once(jnp.ones(4096), paging=paging))
    assert report.devices == (DeviceMemory("cpu:0", report.total, report.total),)


def test_bytes_do_not_depend_on_dtype():
    totals = {
        memory_report(update_once(jnp.ones(10_000, dtype))).total
        for dtype in (jnp.float32, jnp.bfloat16, jnp.float16)
    }
    assert len(totals) == 1


def test_all_states_are_added_up():
    tx = optax.partition(
        {"a": paged_adam8bit(1e-2), "b": paged_adam8bit(1e-3)}, {"w": "a", "v": "b"}
    )
    params = {"v": jnp.ones(5120), "w": jnp.ones(10240)}
    _, state = tx.update(params, tx.init(params), params)
    assert memory_report(state).total == stored_bytes(5120) + stored_bytes(10240)
    before = _ext.num_arenas()
    assert release(state) == stored_bytes(5120) + stored_bytes(10240)
    assert _ext.num_arenas() == before - 2


def test_versions_of_one_state_count_once():
    tx = scale_by_paged_adam8bit()
    params = jnp.ones(5120)
    states = [tx.init(params)]
    for _ in range(3):
        states.append(tx.update(params, states[-1])[1])
    for state in (states, states[::-1], states[0], states[1]):
        assert memory_report(state).total == stored_bytes(5120)
    assert release(states) == stored_bytes(5120)


def test_state_without_updates_has_no_memory():
    state = scale_by_paged_adam8bit().init(jnp.ones(5120))
    report = memory_report(state)
    assert report == MemoryReport(())
    assert (report.total, report.resident, report.on_host) == (0, 0, 0)
    assert str(report).splitlines()[1].split() == ["all", "0", "B", "0", "B", "0", "B"]


# --- The table ----------------------------------------------------------------------------------


def test_table_of_one_device():
    report = MemoryReport((DeviceMemory("cuda:0", 3 * 2**21, 2**21),))
    assert report.on_host == 2**22
    assert str(report) == (
        "moments          total    resident     on host\n"
        "cuda:0        6.00 MiB    2.00 MiB    4.00 MiB"
    )


def test_table_of_two_devices_has_a_total():
    report = MemoryReport(
        (DeviceMemory("cuda:0", 5 * 2**30, 3 * 2**30), DeviceMemory("cuda:1", 2**40, 512))
    )
    assert (report.total, report.resident) == (5 * 2**30 + 2**40, 3 * 2**30 + 512)
    assert report.on_host == report.total - report.resident
    assert str(report) == (
        "moments          total    resident     on host\n"
        "cuda:0        5.00 GiB    3.00 GiB    2.00 GiB\n"
        "cuda:1        1.00 TiB       512 B 1024.00 GiB\n"
        "all           1.00 TiB    3.00 GiB    1.00 TiB"
    )


def test_table_of_one_process_of_several():
    devices = (DeviceMemory("cuda:0", 2**22, 2**21), DeviceMemory("cuda:1", 2**22, 0))
    report = MemoryReport(devices, elsewhere=3 * 2**23)
    assert report.total == 2**23
    assert str(report) == (
        "moments          total    resident     on host\n"
        "cuda:0        4.00 MiB    2.00 MiB    2.00 MiB\n"
        "cuda:1        4.00 MiB         0 B    4.00 MiB\n"
        "here          8.00 MiB    2.00 MiB    6.00 MiB\n"
        "elsewhere    24.00 MiB"
    )


def test_table_of_a_state():
    lines = str(memory_report(update_once(jnp.ones(64 * 256)))).splitlines()
    assert [line.split() for line in lines] == [
        ["moments", "total", "resident", "on", "host"],
        ["cpu:0", "32.50", "KiB", "32.50", "KiB", "0", "B"],
    ]


# --- Moments ------------------------------------------------------------------------------------


def test_moments_are_numpy_arrays_in_the_parameters_tree():
    params = {
        "a": [jnp.ones((3, 4), jnp.bfloat16), None],
        "b": (jnp.ones((64, 80), jnp.float16), jnp.float32(1.0)),
        "c": jnp.ones((0, 3)),
    }
    state = update_once(params)
    for tree, value in zip(moments(state), (0.1, 0.001), strict=True):
        assert jax.tree.structure(tree) == jax.tree.structure(params)
        for leaf, param in zip(jax.tree.leaves(tree), jax.tree.leaves(params), strict=True):
            assert type(leaf) is np.ndarray and leaf.dtype == np.float32
            assert leaf.shape == param.shape
            # Large leaves have 8-bit moments, which may be off by one level: of 127 squares for the
            # first, of 7 bits of fraction for the second.
            np.testing.assert_allclose(leaf, value, rtol=2 / 127 if leaf.size > 4096 else 1e-4)


def test_trees_of_old_models_are_forgotten(monkeypatch):
    monkeypatch.setattr(_names, "trees", OrderedDict())
    monkeypatch.setattr(_names, "MAX_TREES", 3)
    tx = scale_by_paged_adam8bit()
    states = []
    for i in range(4):
        params = {f"w{i}": jnp.full(300, 1.0 + i)}
        states.append(tx.update(params, tx.init(params))[1])
        moments(states[0] if i < 2 else states[i])
    assert len(_names.trees) == 3
    assert list(moments(states[3]).mu) == ["w3"]
    with pytest.raises(RuntimeError, match="the tree of the parameters is unknown: .* 3 "):
        moments(states[0])
    params = {"w0": jnp.ones(300)}
    _, newest = tx.update(params, states[0])  # traced again
    assert list(moments(newest).mu) == ["w0"]


def test_moments_are_a_copy():
    tx = scale_by_paged_adam8bit()
    params = jnp.ones(5120)
    _, state = tx.update(params, tx.init(params))
    first = moments(state)
    first.mu[:] = 7
    assert not np.any(moments(state).mu == 7)
    kept = first.nu.copy()
    _, state = tx.update(params, state)
    release(state)
    np.testing.assert_array_equal(first.nu, kept)


# --- Nothing is left behind ---------------------------------------------------------------------


def resident_set():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads Linux's /proc")
def test_many_states_made_and_released_leave_nothing():
    tx = scale_by_paged_adam8bit()
    update = jax.jit(tx.update, donate_argnums=0)  # so that only moments come and go

    def make_and_release(grads, count):
        for _ in range(count):
            grads, state = update(grads, tx.init(grads))
            assert release(state) > 2**20
        gc.collect()
        return grads

    grads = make_and_release(jnp.ones(2**19), 20)  # 1 MiB of moments
    num_arenas, num_unused, before = _ext.num_arenas(), _ext.num_unused(), resident_set()
    make_and_release(grads, 200)
    assert _ext.num_arenas() == num_arenas
    assert _ext.num_unused() == num_unused
    assert resident_set() - before < 50 * 2**20  # of 200 MiB
