"""`memory_report`, `moments` and `release`: exact numbers, the table, and no memory left behind."""

import gc
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from helpers import (
    ext,
    layout_bytes,
    limit_trees,
    num_arenas,
    num_unused,
    read_leaves,
    read_residuals,
    resident_set,
    stored_leaves,
)
from paged_optax import (
    DeviceMemory,
    MemoryReport,
    Paging,
    Quantization,
    memory_report,
    moments,
    paged_adam8bit,
    release,
    scale_by_paged_adam8bit,
)

# A GPU rounds what it gives up to whole pages: test_gpu.py.
pytestmark = pytest.mark.usefixtures("on_cpu")


def update_once(params, **options):
    tx = scale_by_paged_adam8bit(**options)
    return tx.update(params, tx.init(params))[1]


def stored_bytes(*sizes, min_size=4096):
    """From xla_ffi/README.md: 2 MiB chunks of whole blocks, 8-bit blocks first."""
    small = [size for size in sizes if size < min_size]
    large = [size for size in sizes if size >= min_size]
    return layout_bytes(*(sum(-(-size // 256) for size in group) for group in (large, small)))


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


@pytest.mark.fast
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
    before = num_arenas()
    assert release(state) == stored_bytes(5120) + stored_bytes(10240)
    assert num_arenas() == before - 2


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


@pytest.mark.fast
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
    for tree, value in zip(moments(state)[:2], (0.1, 0.001), strict=True):
        assert jax.tree.structure(tree) == jax.tree.structure(params)
        for leaf, param in zip(jax.tree.leaves(tree), jax.tree.leaves(params), strict=True):
            assert type(leaf) is np.ndarray and leaf.dtype == np.float32
            assert leaf.shape == param.shape
            # Large leaves have 8-bit moments, which may be off by one level: of 127 squares for the
            # first, of 7 bits of fraction for the second.
            np.testing.assert_allclose(leaf, value, rtol=2 / 127 if leaf.size > 4096 else 1e-4)


def test_trees_of_old_models_are_forgotten(monkeypatch):
    trees = limit_trees(monkeypatch, 3)
    tx = scale_by_paged_adam8bit()
    states = []
    for i in range(4):
        params = {f"w{i}": jnp.full(300, 1.0 + i)}
        states.append(tx.update(params, tx.init(params))[1])
        moments(states[0] if i < 2 else states[i])
    assert len(trees) == 3
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


def test_moments_are_read_once(monkeypatch):
    """One question and one reading, whatever the number of leaves: never one a leaf."""
    tx = scale_by_paged_adam8bit(quantization=Quantization(min_size=100))
    params = {f"{i}": jnp.full(50 + i, float(i + 1)) for i in range(100)}
    _, state = tx.update(params, tx.init(params))
    calls = []
    for name in ("describe", "read_leaves"):
        function = getattr(ext, name)
        monkeypatch.setattr(
            ext, name, lambda *args, f=function, n=name: calls.append(n) or f(*args)
        )
    mu = moments(state).mu
    assert calls == ["describe", "read_leaves"]
    for name, param in params.items():
        np.testing.assert_allclose(mu[name], 0.1 * param, rtol=1e-2)


@pytest.mark.parametrize("codec", ["ratio", "dynamic"])
@pytest.mark.parametrize("replay", [False, True])
def test_what_is_stored_of_a_leaf_does_not_depend_on_its_place(codec, replay):
    """Leaves of both kinds in turn, across chunk borders, against each in a state of its own."""
    tx = scale_by_paged_adam8bit(quantization=Quantization(codec, min_size=1000), replay=replay)
    sizes = {"a": 300_000, "b": 999, "c": 1_500_001, "d": 5, "e": 0, "f": 70_000, "g": 256}
    rng = np.random.default_rng(0)
    grads = {name: jnp.asarray(rng.normal(size=n), jnp.float32) for name, n in sizes.items()}

    def store(grads):
        state = tx.init(grads)
        for _ in range(2):
            _, state = tx.update(grads, state)
        return stored_leaves(state)

    for name, stored in zip(grads, store(grads), strict=True):
        (alone,) = store({name: grads[name]})
        assert [part.dtype for part in stored] == [part.dtype for part in alone]
        for part, expected in zip(stored, alone, strict=True):
            np.testing.assert_array_equal(part.view(np.uint8), expected.view(np.uint8))


def test_only_stored_contents_can_be_read():
    tx = scale_by_paged_adam8bit()
    params = jnp.ones(5120)
    _, state = tx.update(params, tx.init(params))
    handle, version = jax.device_get(state.token.value).tolist()
    assert len(read_leaves("cpu", 0, handle, version)) == 1
    with pytest.raises(RuntimeError, match="not the newest"):
        read_leaves("cpu", 0, handle, version + 1)
    with pytest.raises(RuntimeError, match="not the newest"):
        read_leaves("cpu", 0, handle, 0)
    with pytest.raises(RuntimeError, match="are on cpu:0 but the step ran on cpu:1"):
        read_leaves("cpu", 1, handle, version)
    with pytest.raises(ValueError, match="keeps no residuals"):
        read_residuals("cpu", 0, handle, version)
    release(state)
    with pytest.raises(RuntimeError, match="were released"):
        read_leaves("cpu", 0, handle, version)


# --- Nothing is left behind ---------------------------------------------------------------------


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
    arenas, unused, before = num_arenas(), num_unused(), resident_set()
    make_and_release(grads, 200)
    assert num_arenas() == arenas
    assert num_unused() == unused
    assert resident_set() - before < 50 * 2**20  # of 200 MiB
