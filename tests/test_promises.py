"""Memory that is promised is there; a first step that fails on one device fails on all."""

import errno
import pickle
import tempfile
import threading
import time
from subprocess import run

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import paged_optax
from helpers import RAISES, assert_trees_equal, finish, hooks, num_arenas
from paged_optax import Paging, memory_report, moments, release

pytestmark = pytest.mark.usefixtures("on_cpu")

MIB = 1 << 20


@pytest.fixture(autouse=True)
def nothing_is_left():
    yield
    hooks.withdraw_failure()
    hooks.pretend_available(-1)


def params_of(mib):
    """Parameters whose moments take so many MiB (and 2 % more)."""
    return {"w": jnp.ones((mib, MIB // 2), jnp.bfloat16)}


def sharded(mib):
    """The same, a quarter on each of four devices."""
    mesh = jax.make_mesh((4,), ("x",), devices=jax.devices("cpu")[:4])
    return jax.device_put(params_of(mib), NamedSharding(mesh, P(None, "x")))


def step(tx, grads, state):
    return finish(jax.jit(tx.update)(grads, state, grads))


def await_no_arenas():
    """The devices of a program that failed do not end at the same time."""
    deadline = time.monotonic() + 20
    while num_arenas() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert num_arenas() == 0


def test_states_do_not_share_a_promise():
    """Nobody has touched the memory of the first state when the second asks."""
    tx = paged_optax.scale_by_paged_adam8bit()
    params = params_of(4)
    first, second = tx.init(params), tx.init(params)
    hooks.pretend_available(6 * MIB)
    _, first = step(tx, params, first)
    match = (
        "need 4.06 MiB of host memory but 6.00 MiB are available.*of which 4.06 MiB are promised"
    )
    with pytest.raises(RAISES, match=match):
        step(tx, params, second)
    _, first = step(tx, params, first)
    release(first)
    _, second = step(tx, params, second)  # the same state, now that there is room
    assert memory_report(second).total > 4 * MIB


def is_tmpfs(folder):
    return run(["stat", "-fc", "%T", folder], capture_output=True).stdout == b"tmpfs\n"


@pytest.mark.skipif(not is_tmpfs("/dev/shm"), reason="no tmpfs")
def test_a_file_in_ram_needs_ram():
    """Its room is asked for like that of plain memory, before any of it is taken."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        tx = paged_optax.scale_by_paged_adam8bit(paging=Paging(directory=folder))
        params = params_of(4)
        state = tx.init(params)
        hooks.pretend_available(2 * MIB)
        with pytest.raises(RAISES, match="need 4.06 MiB of host memory but 2.00 MiB"):
            step(tx, params, state)
        hooks.pretend_available(-1)
        _, state = step(tx, params, state)
        release(state)


def test_what_was_touched_is_no_longer_promised():
    """The system's own number has it already, so it must not count twice."""
    tx = paged_optax.scale_by_paged_adam8bit()
    params = params_of(8)
    _, state = step(tx, params, tx.init(params))
    assert hooks.promised() < MIB
    release(state)
    assert hooks.promised() == 0
    replay = paged_optax.scale_by_paged_adam8bit(replay=True)
    _, state = step(replay, params, replay.init(params))
    # The second copy, of which a page of 2 MiB that it begins on may be there already.
    assert 6 * MIB < hooks.promised() < 9 * MIB
    _, state = step(replay, params, state)
    assert hooks.promised() < MIB


def test_devices_of_one_program_are_added_up():
    """Three of four find room. Then none keeps memory, and the state is as it was."""
    tx = paged_optax.scale_by_paged_adam8bit()
    params = sharded(16)
    state = tx.init(params)
    hooks.pretend_available(14 * MIB)
    with pytest.raises(RAISES, match="promised to the moments of other states and devices"):
        step(tx, params, state)
    await_no_arenas()
    assert hooks.promised() == 0
    hooks.pretend_available(-1)
    _, state = step(tx, params, state)
    assert len(memory_report(state).devices) == 4


@pytest.mark.parametrize("is_restored", [False, True], ids=["fresh", "restored"])
@pytest.mark.parametrize("after", range(4))
def test_first_step_that_fails_on_one_device(after, is_restored):
    """Whichever it is: it is undone on the others, and the same state can be stepped again."""
    tx = paged_optax.scale_by_paged_adam8bit()
    params = sharded(1)
    expected, newest = step(tx, params, tx.init(params))
    text = pickle.dumps(newest)
    expected = step(tx, params, newest)[0] if is_restored else expected
    release(newest)
    state = pickle.loads(text) if is_restored else tx.init(params)
    hooks.fail_call("mmap", errno.ENOMEM, after=after)
    with pytest.raises(RAISES, match="refused .* for the optimizer's moments, mmap"):
        step(tx, params, state)
    assert not hooks.withdraw_failure()
    await_no_arenas()
    actual, state = step(tx, params, state)
    assert_trees_equal(actual, expected)
    assert len(memory_report(state).devices) == 4
    moments(state)


def test_first_step_does_not_stop_other_states(tmp_path):
    """Its file takes its time. Other states step meanwhile, and release waits for it."""
    slow = paged_optax.scale_by_paged_adam8bit(paging=Paging(directory=tmp_path))
    other = paged_optax.scale_by_paged_adam8bit()
    params = params_of(1)
    update = jax.jit(other.update)
    _, state = jax.block_until_ready(update(params, other.init(params)))
    fresh = slow.init(params)
    hooks.fail_call("posix_fallocate", -600_000)

    def first_step():
        with jax.default_device(jax.devices("cpu")[0]):
            step(slow, params, fresh)

    thread = threading.Thread(target=first_step)
    thread.start()
    while hooks.is_asked():
        time.sleep(0.01)
    for _ in range(3):
        _, state = jax.block_until_ready(update(params, state))
    assert num_arenas() == 1  # the other one is not there yet
    threading.Timer(0.2, hooks.withdraw_failure).start()
    assert release(fresh) > 0  # 0 if it had not waited
    thread.join()
    assert num_arenas() == 1
