"""System calls that fail: an error that says so or a correct step, and never a moment lost.

A test build can make any call fail that is written as PAGED_CALL (xla_ffi/base/faults.h).
"""

import errno
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paged_optax
from helpers import RAISES, assert_trees_equal, finish, hooks, num_arenas
from paged_optax import Paging, evict, memory_report, moments, prefetch, release

pytestmark = pytest.mark.usefixtures("on_cpu")

PARAMS = {"w": jnp.ones((300, 200))}
BTRFS, ZFS, NFS = 0x9123683E, 0x2FC12FC1, 0x6969


@pytest.fixture(autouse=True)
def no_failure_is_left():
    yield
    hooks.withdraw_failure()


def optimizer(directory):
    return paged_optax.scale_by_paged_adam8bit(paging=Paging(directory=directory))


def grads(step):
    rng = np.random.default_rng(step)
    return {"w": jnp.asarray(rng.standard_normal((300, 200)), jnp.float32)}


@pytest.fixture
def in_a_file(tmp_path):
    """An optimizer with moments in a file, and its state after two steps."""
    tx = optimizer(tmp_path)
    state = tx.init(PARAMS)
    for step in range(2):
        _, state = tx.update(grads(step), state)
    yield tx, jax.block_until_ready(state)
    paged_optax.release_all()


def test_write_that_fails_keeps_the_moments(in_a_file):
    tx, state = in_a_file
    before = moments(state)
    hooks.fail_call("msync", errno.ENOSPC)
    with pytest.raises(MemoryError, match="could not be written.*No space left.*still whole"):
        evict(state)
    report = memory_report(state)
    assert report.on_host == 0
    assert "No space left" in report.devices[0].trouble and "still whole" in str(report)
    assert_trees_equal(moments(state), before)
    _, state = tx.update(grads(2), state)
    assert memory_report(state).devices[0].trouble  # until a write works
    evict(state)
    report = memory_report(state)
    assert not report.devices[0].trouble and "could not be written" not in str(report)
    moments(state)


def test_write_that_failed_unnoticed(in_a_file):
    """The kernel writes by itself, and says once that it could not: no use of the state goes on."""
    tx, state = in_a_file
    hooks.fail_call("sync_file_range", errno.EIO)
    match = "could not write moments.*Input/output error.*cannot be trusted.*init"
    for use in (lambda: tx.update(grads(2), state), lambda: moments(state), lambda: evict(state)):
        with pytest.raises(RAISES, match=match):
            finish(use())
    with pytest.raises(RAISES, match=match):
        memory_report(state)
    assert release(state) > 0


def test_file_system_that_cannot_tell(in_a_file):
    """That sync_file_range does not work is no sign of a failed write."""
    tx, state = in_a_file
    hooks.fail_call("sync_file_range", errno.ENOSYS)
    jax.block_until_ready(tx.update(grads(2), state))


@pytest.mark.parametrize(
    "call, error, match",
    [
        ("open", errno.EACCES, "no file can be made in.*Permission denied"),
        ("posix_fallocate", errno.ENOSPC, "has no .* for the optimizer's moments .No space left"),
        ("mmap", errno.ENOMEM, "refused .* mmap .Cannot allocate memory"),
        ("mmap", errno.ENODEV, "cannot map files into memory.*ordinary local file system"),
    ],
)
def test_first_step_that_fails(tmp_path, call, error, match):
    """Nothing is left of it, and the same state can be stepped once the cause is gone."""
    tx = optimizer(tmp_path)
    state = tx.init(PARAMS)
    hooks.fail_call(call, error)
    with pytest.raises(RAISES, match=match):
        finish(tx.update(grads(0), state))
    assert num_arenas() == 0
    assert os.listdir(tmp_path) == []
    jax.block_until_ready(tx.update(grads(0), state))


def attempt(action, *args, is_patient):
    """What the action returns, the second time if it fails the first."""
    try:
        return finish(action(*args))
    except (*RAISES, MemoryError):
        assert is_patient
        return finish(action(*args))


def run(tx, start, is_patient=False):
    """Updates and moments of three steps, with moments paged out and in between them."""
    state, updates = start(PARAMS), []
    for step in range(3):
        update, state = attempt(tx.update, grads(step), state, is_patient=is_patient)
        updates.append(update)
        for action in evict, prefetch:
            attempt(action, state, is_patient=is_patient)
    result = updates, attempt(moments, state, is_patient=is_patient)
    release(state)
    return result


@pytest.mark.parametrize(
    "place, least", [("file", 20), ("plain memory", 2), ("checkpoint", 12)], ids=str
)
def test_every_call_fails_once(tmp_path, place, least):
    """Each in turn: an error, and then the same bits as without it."""
    tx = optimizer(None if place == "plain memory" else tmp_path)
    start = tx.init
    if place == "checkpoint":
        _, state = jax.block_until_ready(tx.update(grads(9), tx.init(PARAMS)))
        paged_optax.save_moments(state, tmp_path / "moments")
        start = lambda params: paged_optax.load_moments(tx.init(params), tmp_path / "moments")  # noqa: E731
    expected = run(tx, start)
    for num_calls in range(200):
        hooks.fail_call("", errno.ENOMEM, after=num_calls)
        actual = run(tx, start, is_patient=True)
        if hooks.withdraw_failure():  # there are no more calls
            assert num_calls >= least
            return
        assert_trees_equal(actual, expected)
    raise AssertionError("more calls than expected")


def test_file_system_without_nameless_files(tmp_path):
    """As some on a network: a file gets a name, and loses it at once."""
    tx = optimizer(tmp_path)
    hooks.fail_call("open", errno.EOPNOTSUPP)
    _, state = finish(tx.update(grads(0), tx.init(PARAMS)))
    assert not hooks.withdraw_failure()
    assert os.listdir(tmp_path) == []
    assert evict(state) > 0


@pytest.mark.parametrize(
    "type, word",
    [(BTRFS, "copy on write"), (ZFS, "copy on write"), (NFS, "another machine"), (0xEF53, "")],
    ids=["btrfs", "ZFS", "NFS", "ext4"],
)
def test_file_systems_that_are_not_safe(type, word):
    danger = hooks.danger_of(type)
    assert word in danger and bool(danger) == bool(word)
