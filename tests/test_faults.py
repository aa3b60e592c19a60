"""System calls that fail: an error that says so or a correct step, and never a moment lost.

A test build can make any call fail that is written as PAGED_CALL (xla_ffi/base/faults.h).
"""

import errno
import os
import re
import shutil
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import paged_optax
from helpers import RAISES, assert_trees_equal, finish, hooks, num_arenas, run_python, token_of
from paged_optax import Paging, evict, memory_report, moments, prefetch, release

pytestmark = pytest.mark.usefixtures("on_cpu")

PARAMS = {"w": jnp.ones((300, 200))}
BTRFS, BCACHEFS, ZFS, NFS = 0x9123683E, 0xCA451A4E, 0x2FC12FC1, 0x6969


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
    sound = finish(tx.update(grads(1), tx.init(grads(0))))[1]
    found = {entry.handle: entry for entry in paged_optax.states()}
    lost = found.pop(token_of(state)[0])
    assert re.search(match, lost.trouble) and lost.trouble in str(lost)
    assert not found[token_of(sound)[0]].trouble
    assert release(lost) == lost.nbytes > 0


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("num_calls, num_updated", list(enumerate([0, 0, 0, 1, 1])))
def test_a_step_that_is_lost_in_the_middle(tmp_path, num_calls, num_updated):
    """Of `paged`: each parameter gets its right update or none, and the state is as it was.

    A step opens, and loads and stores the states of each of two parameters.
    """
    tx = paged_optax.paged(
        optax.adam(0.1),
        paging=Paging(directory=tmp_path),
        quantization=paged_optax.Quantization("float32"),
    )
    params = {"a": jnp.ones((64, 64)), "b": jnp.ones((64, 64))}
    alone, update = optax.adam(0.1), jax.jit(tx.update)
    state, state_alone = tx.init(params), alone.init(params)
    for _ in range(2):
        _, state = update(params, state, params)
        _, state_alone = alone.update(params, state_alone, params)
    expected, _ = alone.update(params, state_alone, params)
    before = list(map(np.asarray, jax.tree.leaves(jax.block_until_ready(state))))
    hooks.fail_call("sync_file_range", errno.EIO, after=num_calls)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        updates, state = jax.block_until_ready(update(params, state, params))
    hooks.withdraw_failure()
    updated = [name for name in params if updates[name].any()]
    assert len(updated) == num_updated
    for name in updated:
        np.testing.assert_allclose(updates[name], expected[name], rtol=1e-5)
    for leaf, old in zip(jax.tree.leaves(state), before, strict=True):
        np.testing.assert_array_equal(leaf, old)
    with pytest.raises(RAISES, match="could not write moments") as caught:
        finish(update(params, state, params))
    assert ("its whole update or none" in str(caught.value)) == (num_calls > 0)
    release(state)


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
    [
        (BTRFS, "copy on write"),
        (BCACHEFS, "copy on write"),
        (ZFS, "copy on write"),
        (NFS, "another machine"),
        (0xEF53, ""),
    ],
    ids=["btrfs", "bcachefs", "ZFS", "NFS", "ext4"],
)
def test_file_systems_that_are_not_safe(type, word):
    danger = hooks.danger_of(type)
    assert word in danger and bool(danger) == bool(word)


ON_BTRFS = """
import subprocess, warnings
import jax, jax.numpy as jnp
from paged_optax import Paging, evict, moments, scale_by_paged_adam8bit
mount = "truncate -s 400M image && mkfs.btrfs -q image && mkdir disk && mount -o loop image disk"
subprocess.run(mount, shell=True, check=True)
tx = scale_by_paged_adam8bit(paging=Paging(directory="disk"))
params = {"w": jnp.ones((1 << 20,))}
with warnings.catch_warnings(record=True) as caught:
    _, state = jax.block_until_ready(tx.update(params, tx.init(params)))
    assert any("at risk: it is btrfs" in str(w.message) for w in caught), caught
evict(state)
try:
    with open("disk/other", "wb", buffering=0) as other:
        while True:
            other.write(bytes(1 << 20))
except OSError:
    pass
for _ in range(3):
    _, state = jax.block_until_ready(tx.update(params, state))
    evict(state)
print("moments", float(moments(state).mu["w"][0]) > 0)
"""


@pytest.mark.endurance
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
@pytest.mark.skipif(shutil.which("mkfs.btrfs") is None, reason="without btrfs-progs")
def test_real_btrfs_that_is_full(tmp_path):
    """It is told to write in place, so that data have their room; that is no promise, it warns."""
    in_a_mount_space = f"import os; os.unshare(os.CLONE_NEWNS)\n{ON_BTRFS}"
    if sys.version_info < (3, 12):
        pytest.skip("os.unshare is new in Python 3.12")
    private = "import subprocess; subprocess.run(['mount', '--make-rprivate', '/'], check=True)\n"
    code = in_a_mount_space.replace("\n", "\n" + private, 1)
    process = run_python(code, tmp_path, check=False)
    if "mount" in process.stderr and process.returncode:
        pytest.skip("this machine mounts no btrfs")
    assert process.stdout == "moments True\n", process
