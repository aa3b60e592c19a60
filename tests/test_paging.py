"""Where moments live: the policy, files on the CPU, and movement on a GPU.

Managed allocations stay far below what a card has free; pressure is made with budgets.
"""

import os
import signal
import subprocess
import sys
import time
from concurrent import futures

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given

from helpers import (
    RAISES,
    assert_trees_equal,
    finish,
    forget_notices,
    free_device_bytes,
    hooks,
    num_arenas,
    resident_set,
    run_python,
)
from paged_optax import (
    Paging,
    Quantization,
    evict,
    memory_report,
    moments,
    paged_adamw8bit,
    prefetch,
    release,
    scale_by_paged_adam8bit,
)

MIB = 2**20
# -------------------------------------------------------------------------------------- the policy

demands = st.lists(st.tuples(st.integers(0, 1000), st.integers(-1, 1500)), max_size=6)


@given(demands=demands, capacity=st.integers(-10, 3000))
def test_fair_shares(demands, capacity):
    """Max-min: nobody can have more without taking it from one who has no more."""
    shares = hooks.fair_shares(demands, capacity)
    total = sum(shares)
    assert total <= max(0, capacity)
    for share, (wanted, budget) in zip(shares, demands, strict=True):
        assert 0 <= share <= wanted
        if share < wanted:
            limit = capacity if budget < 0 else min(budget, capacity)
            some = len(demands)  # bytes that cannot be split among all
            # Its budget is met or nothing is left; nobody whom no smaller budget stops has more.
            assert total + some > limit or limit < total
            for other, (_, other_budget) in zip(shares, demands, strict=True):
                if budget < 0 or 0 <= other_budget <= budget:
                    assert other <= share + some


@pytest.mark.parametrize(
    "demands, capacity, shares",
    [
        ([], 10, []),
        ([(10, -1)], 100, [10]),
        ([(10, -1)], 7, [7]),
        ([(10, -1)], -5, [0]),
        ([(10, -1), (10, -1)], 10, [5, 5]),
        ([(2, -1), (10, -1)], 10, [2, 8]),
        ([(10, 4), (10, -1)], 100, [2, 10]),  # the first stops when both together have 4
        ([(10, 0), (10, -1)], 100, [0, 10]),
        ([(10, 3)], 100, [3]),
        ([(5, -1), (5, -1), (5, -1)], 10, [4, 3, 3]),
        ([(2**60, -1), (2**60, -1)], 2**61, [2**60, 2**60]),
    ],
)
def test_fair_shares_by_hand(demands, capacity, shares):
    assert hooks.fair_shares(demands, capacity) == shares


def test_capacity_shrinks_at_once_and_grows_when_it_lasts():
    assert hooks.steady_capacity([5] * 3) == [5] * 3
    assert hooks.steady_capacity([5, 3, 5, 5]) == [5, 3, 3, 3]
    assert hooks.steady_capacity([3] + [9] * 9) == [3] * 8 + [9, 9]
    flicker = [9, 3] * 20
    assert max(hooks.steady_capacity(flicker)[1:]) == 3  # never follows


# ----------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"memory": "device"}, ValueError, "unknown memory 'device'"),
        ({"directory": 3}, TypeError, "directory is 3"),
        ({"directory": ""}, ValueError, "directory is empty"),
        ({"directory": b"/tmp"}, TypeError, "directory is b'/tmp'"),
        ({"directory": os.fsdecode(b"/tmp/\xff")}, ValueError, "UTF-8.*symbolic link"),
        ({"directory": "/tmp/\0"}, ValueError, "UTF-8"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        Paging(**options)


@pytest.mark.parametrize("nbytes, error", [(-1, ValueError), (1.5, TypeError), (None, TypeError)])
def test_bad_limit(nbytes, error):
    with pytest.raises(error, match="device_bytes is"):
        evict(optax.EmptyState(), nbytes)


def test_what_has_no_moments():
    with pytest.raises(ValueError, match="no paged optimizer state"):
        prefetch(optax.EmptyState())
    state = scale_by_paged_adam8bit().init(jnp.ones(5000))
    assert evict(state) == prefetch(state) == 0  # never updated: nothing there to move
    _, state = scale_by_paged_adam8bit().update(jnp.ones(5000), state)
    release(state)
    for question in evict, prefetch:
        with pytest.raises(RuntimeError, match="were released"):
            question(state)


# ------------------------------------------------------------------------------------ files on CPU


def train(steps=4, seed=0, **options):
    """Parameters and state after some steps over leaves of several kinds."""
    tx = paged_adamw8bit(1e-2, **options)
    rng = np.random.default_rng(seed)
    shapes = {"a": (700, 300), "b": (77,), "c": (64, 64)}
    params = {name: jnp.asarray(rng.standard_normal(s), jnp.float32) for name, s in shapes.items()}
    state = tx.init(params)
    step = jax.jit(tx.update)
    for _ in range(steps):
        grads = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), params)
        updates, state = step(grads, state, params)
        params = optax.apply_updates(params, updates)
    return finish((params, state))


@pytest.mark.fast
@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("replay", [False, True])
def test_moments_in_a_file(tmp_path, replay):
    params, state = train(paging=Paging(directory=tmp_path), replay=replay)
    plain, plain_state = train(replay=replay)
    assert_trees_equal(params, plain)
    assert_trees_equal(moments(state), moments(plain_state))
    (device,) = memory_report(state).devices
    assert device.memory == "file"
    assert device.total == memory_report(plain_state).total
    assert os.listdir(tmp_path) == []  # the file has no name
    assert release(state) == device.total


@pytest.mark.usefixtures("on_cpu")
def test_file_is_written_out_and_read_again(tmp_path):
    if subprocess.run(["stat", "-fc", "%T", tmp_path], capture_output=True).stdout == b"tmpfs\n":
        pytest.skip("a file in RAM stays there")
    _, state = train(paging=Paging(directory=tmp_path))
    before = moments(state)
    assert evict(state) > 0
    report = memory_report(state)
    assert report.on_host > report.total // 2
    assert_trees_equal(moments(state), before)
    prefetch(state)
    release(state)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("directory", ["missing", "a file"])
def test_directory_that_cannot_be_used(tmp_path, directory):
    (tmp_path / "a file").touch()
    with pytest.raises(RAISES, match="no file can be made in.*existing directory"):
        train(paging=Paging(directory=tmp_path / directory))
    assert num_arenas() == 0


def test_disk_without_room_is_an_error_and_no_signal(tmp_path):
    """A limit on the size of files stands in for a full disk: both stop the reservation."""
    code = """
    import helpers, jax.numpy as jnp, paged_optax, resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
    tx = paged_optax.scale_by_paged_adam8bit(paging=paged_optax.Paging(directory="."))
    params = jnp.ones(3_000_000)
    try:
        tx.update(params, tx.init(params))
    except (RuntimeError, ValueError, MemoryError) as error:
        print(error)
    print(helpers.num_arenas())
    """
    process = run_python(code, tmp_path)
    assert "has no 5.81 MiB for the optimizer's moments" in process.stdout
    assert "Nothing was allocated" in process.stdout
    assert process.stdout.endswith("0\n")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("end", ["sys.exit()", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_nothing_is_left_behind(tmp_path, end):
    code = f"""
    import jax.numpy as jnp, os, paged_optax, signal, sys
    tx = paged_optax.scale_by_paged_adam8bit(paging=paged_optax.Paging(directory="."))
    params = jnp.ones(3_000_000)
    _, state = tx.update(params, tx.init(params))
    state.token.value.block_until_ready()
    assert paged_optax.memory_report(state).devices[0].memory == "file"
    {end}
    """
    process = run_python(code, tmp_path, check=False)
    assert process.returncode == (-signal.SIGKILL if "SIGKILL" in end else 0), process.stderr
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_address_space_is_checked_first(tmp_path):
    """The message is that of the check, and not of an mmap that was refused."""
    code = """
    import jax, jax.numpy as jnp, paged_optax, resource
    params = jnp.ones(20_000_000)
    tx = paged_optax.scale_by_paged_adam8bit()
    state = tx.init(params)
    update = jax.jit(tx.update, donate_argnums=0).lower(params, state).compile()
    jax.block_until_ready((params, state))
    size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 2**23, -1))
    updates, state = jax.block_until_ready(update(params, state))
    try:
        update(updates, state)
    except paged_optax.StateRefused as error:
        print(error)
    """
    process = run_python(code, tmp_path)
    assert "need 38.75 MiB of address space" in process.stdout
    assert "ulimit -v" in process.stdout


# ----------------------------------------------------------------------------------------- notices


@pytest.mark.fast
def test_notices_become_warnings_once(monkeypatch):
    forget_notices(monkeypatch)
    with pytest.warns(RuntimeWarning, match="paged_optax: something happened"):
        hooks.post_notice(77, 0, "something happened")
        hooks.deliver_notices()
    with pytest.warns(RuntimeWarning, match="in host memory"):
        hooks.post_notice(77, 5, "moments are in host memory")
        hooks.deliver_notices()
    hooks.post_notice(77, 5, "moments are in host memory")  # the same again: no warning
    hooks.deliver_notices()


# ------------------------------------------------------------------------------------------ on GPU

gpu = pytest.mark.gpu
kinds = pytest.mark.parametrize("memory", ["managed", "pinned"])


class Run:
    """A training on the GPU that can be stopped between steps; 24 MiB of moments, 12 segments."""

    def __init__(self, seed=0, replay=False, size=12 * 4032 * 256 - 9000, **paging):
        quantization = Quantization(min_size=10_000)  # the small leaves in float32
        self.tx = scale_by_paged_adam8bit(
            paging=Paging(**paging), quantization=quantization, replay=replay
        )
        key = jax.random.key(seed)
        self.params = {
            "large": jax.random.normal(key, (size,)),
            "small": jax.random.normal(key, (8_000,)),
            "half": jax.random.normal(key, (333, 100), jnp.bfloat16),
        }
        self.state = self.tx.init(self.params)

        @jax.jit
        def step(params, state, i):
            grads = jax.tree.map(
                lambda p: jax.random.normal(jax.random.key(i), p.shape, p.dtype) * p, params
            )
            updates, state = self.tx.update(grads, state)
            params = jax.tree.map(lambda p, u: p - (0.01 * u).astype(p.dtype), params, updates)
            return params, state

        self.step_function = step
        self.steps = 0

    def step(self, count=1):
        for _ in range(count):
            self.params, self.state = self.step_function(self.params, self.state, self.steps)
            self.steps += 1
        return self

    @property
    def report(self):
        return memory_report(self.state)

    def settle(self, timeout=20.0):
        """Steps until nothing moves any more."""
        end = time.monotonic() + timeout
        quiet = 0
        while quiet < 20 and time.monotonic() < end:
            before = self.report.devices[0].moved
            self.step()
            time.sleep(0.005)
            quiet = quiet + 1 if self.report.devices[0].moved == before else 0
        return self


@pytest.fixture(scope="module")
def undisturbed():
    """Parameters and moments after 30 steps, everything resident."""
    run = Run().step(30)
    return jax.device_get(run.params), moments(run.state)


def assert_undisturbed(run, undisturbed):
    assert run.steps == 30
    params, stored = undisturbed
    assert_trees_equal(jax.device_get(run.params), params)
    assert_trees_equal(moments(run.state), stored)


@gpu
@kinds
@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
def test_placement_changes_no_bit(memory, share, undisturbed):
    total = 13 * 2 * MIB
    run = Run(memory=memory, device_bytes=int(share * total)).step(30)
    (device,) = run.report.devices
    assert device.memory == memory
    assert device.resident == int(share * total) // (2 * MIB) * 2 * MIB
    assert device.moved == 0
    assert_undisturbed(run, undisturbed)


@gpu
@kinds
def test_evict_and_prefetch(memory, undisturbed):
    run = Run(memory=memory).step(7)
    total = run.report.total
    assert run.report.resident == total
    free = free_device_bytes(0)
    assert evict(run.state) == total
    assert run.report.resident == 0
    if memory == "pinned":  # of managed memory the driver keeps it for the next cudaMalloc
        assert free_device_bytes(0) - free >= total - 4 * MIB
    run.step(8)
    assert run.report.resident == 0  # stays out
    assert evict(run.state, 10 * MIB) == 10 * MIB
    assert run.report.resident == 10 * MIB
    run.step(8)
    assert prefetch(run.state) == total - 10 * MIB
    assert run.report.resident == total
    run.step(7)
    (device,) = run.report.devices
    assert device.moved == 2 * total
    assert device.moving_seconds > 0
    assert_undisturbed(run, undisturbed)


@gpu
@kinds
@pytest.mark.parametrize("replay", [False, True])
def test_thousand_steps_with_random_moves(memory, replay):
    """Bitwise as without any: by hand while steps are queued, and in the background."""
    size = 12 * 4032 * 256
    quiet = Run(size=size, replay=replay).step(1000)
    run = Run(size=size, memory=memory, replay=replay)
    rng = np.random.default_rng(0)
    while run.steps < 1000:
        run.step(min(int(rng.integers(1, 12)), 1000 - run.steps))
        if rng.random() < 0.6:
            evict(run.state, int(rng.integers(0, 60)) * MIB)
        else:
            prefetch(run.state)
    assert run.report.devices[0].moved > 20 * run.report.total
    assert_trees_equal(jax.device_get(run.params), jax.device_get(quiet.params))
    assert_trees_equal(moments(run.state), moments(quiet.state))


@gpu
@kinds
def test_states_share_a_budget_fairly(memory):
    budget = 26 * MIB
    first = Run(memory=memory, device_bytes=budget).step(2)
    assert first.report.on_host == 0
    second = Run(memory=memory, device_bytes=budget).step(2)
    for _ in range(60):
        first.step(), second.step()
        time.sleep(0.005)
    shares = [run.report.resident for run in (first, second)]
    assert sum(shares) <= budget
    assert min(shares) >= budget // 2 - 4 * MIB
    release(first.state)
    second.settle()
    assert second.report.on_host == 0


@gpu
@kinds
def test_moments_make_room_and_come_back(memory):
    """Room is taken by an allocation beyond the headroom, not by filling the card."""
    quiet = Run().step()
    free = free_device_bytes(0)
    run = Run(memory=memory, headroom_bytes=free - 300 * MIB).step(3)
    assert run.report.on_host == 0
    with taken(400 * MIB):
        run.settle()
        assert run.report.resident == 0
    run.settle()
    assert run.report.on_host == 0
    quiet.step(run.steps - quiet.steps)
    assert_trees_equal(jax.device_get(run.params), jax.device_get(quiet.params))
    assert_trees_equal(moments(run.state), moments(quiet.state))


class taken:
    """Device memory outside XLA's pool."""

    def __init__(self, nbytes):
        self.nbytes = nbytes

    def __enter__(self):
        self.buffer = hooks.take_device_memory(0, self.nbytes)

    def __exit__(self, *_):
        del self.buffer


@gpu
def test_fallback_says_so(undisturbed):
    hooks.pretend_not_managed(True)
    try:
        with pytest.warns(RuntimeWarning, match="managed memory cannot be used.*pinned"):
            run = Run().step(1)
            jax.block_until_ready(run.state)
            hooks.deliver_notices()
    finally:
        hooks.pretend_not_managed(False)
    assert run.report.devices[0].memory == "pinned"
    run.step(29)
    assert_undisturbed(run, undisturbed)


@gpu
def test_file_is_refused_on_a_gpu(tmp_path):
    with pytest.raises(RAISES, match="only the CPU can use"):
        run = Run(directory=tmp_path).step()
        finish(run.params)


@gpu
def test_a_step_never_waits_for_a_move():
    """Steps return while a large state moves to the host and back in another thread."""
    run = Run(size=2**28).step(3)
    jax.block_until_ready(run.state)

    state = run.state

    def move():
        return sum(evict(state) + prefetch(state) for _ in range(3))

    times = []
    with futures.ThreadPoolExecutor() as pool:
        moved = pool.submit(move)
        while not moved.done():
            start = time.perf_counter()
            run.step()
            times.append(time.perf_counter() - start)
            jax.block_until_ready(run.state)
    assert moved.result() == 6 * run.report.total
    median, most = np.quantile(times, [0.5, 0.9])
    print(f"{len(times)} steps beside moves returned after {1e3 * median:.2f} ms, 9 in 10 of them")
    print(f"within {1e3 * most:.2f} ms, all within {1e3 * max(times):.2f} ms")
    assert median < 2e-3 and most < 5e-3


@gpu
@kinds
def test_thousand_states_leave_nothing_behind(memory):
    params = {"w": jnp.ones(2_000_000)}
    tx = scale_by_paged_adam8bit(paging=Paging(memory=memory))
    init, update = jax.jit(tx.init), jax.jit(tx.update)

    def cycle(count):
        for i in range(count):
            _, state = update(params, init(params))
            if i % 100 == 0:
                evict(state), prefetch(state)
            release(state)

    cycle(50)
    before = free_device_bytes(0), resident_set()
    cycle(1000)
    after = free_device_bytes(0), resident_set()
    # They had 6 GB together. What the driver keeps for later use goes up and down.
    assert before[0] - after[0] <= 128 * MIB
    assert after[1] - before[1] <= 32 * MIB
    assert num_arenas() == 0


@gpu
def test_report_shows_everything():
    run = Run(device_bytes=10 * MIB).step(2)
    (device,) = run.report.devices
    assert device.budget == 10 * MIB
    assert device.free > 0
    assert device.pool >= device.pool_in_use > 0
    groups = {group.name: group for group in run.report.groups}
    assert set(groups) == {"large", "small", "half"}
    assert groups["small"].resident == 0  # float32 moments come last
    assert 0 < groups["large"].resident < groups["large"].total
    text = str(run.report)
    assert "budget 10.00 MiB" in text and "XLA's pool" in text
