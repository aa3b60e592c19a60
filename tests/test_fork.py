"""Forked processes (data loaders, `multiprocessing` with "fork"): they get no moments."""

import sys

import pytest

from helpers import run_python

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="counts on Linux's fork")

START = """
import os, pickle, signal, sys, threading, time, warnings
warnings.simplefilter("ignore")  # JAX's own, about forks
import jax, jax.numpy as jnp, numpy as np, paged_optax
from helpers import num_arenas
from paged_optax import Paging, evict, memory_report, moments, prefetch, release, release_all

def in_child(action):
    "What the action prints and raises in a forked process, and how that ends."
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.alarm(600)
        try:
            text = str(action())
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
        os.write(write, text.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as file:
        text = file.read()
    _, status = os.waitpid(pid, 0)
    assert status == 0, (status, text)
    return text

params = {"w": jnp.ones((300, 200))}
"""


def run(code, tmp_path):
    assert run_python(START + code, tmp_path).stdout.endswith("done\n")


@pytest.mark.parametrize("directory", ["None", "'.'"], ids=["plain memory", "file"])
def test_a_child_has_no_moments(tmp_path, directory):
    """It says so, whatever it tries, and the parent goes on."""
    code = f"""
tx = paged_optax.scale_by_paged_adam8bit(paging=Paging(directory={directory}))
fresh = tx.init(params)
_, state = tx.update(params, fresh)
before = moments(state).mu["w"]
questions = [
    lambda: moments(state),
    lambda: memory_report(state),
    lambda: evict(state),
    lambda: prefetch(state),
    lambda: tx.update(params, state),
    lambda: tx.update(params, fresh),
]
for question in questions:
    text = in_child(question)
    assert "in the process that this one was forked from" in text, text
    assert "make a new state here with init(params)" in text
grandchild = in_child(lambda: in_child(questions[0]))
assert "in the process that this one was forked from" in grandchild
assert in_child(lambda: release(state)) == in_child(release_all) == in_child(num_arenas) == "0"
np.testing.assert_array_equal(moments(state).mu["w"], before)
_, state = tx.update(params, state)
print("done")
"""
    run(code, tmp_path)


def test_states_of_two_processes_have_different_handles(tmp_path):
    """A child's pickled state does not step the moments of its parent, nor of another child."""
    code = """
tx = paged_optax.scale_by_paged_adam8bit()

def first_handle():
    state = tx.init(params)
    _, state = tx.update(params, state)
    return int(jax.tree.leaves(state.token)[0][0])

handles = {first_handle(), *(int(in_child(first_handle)) for _ in range(3))}
assert len(handles) == 4, handles
print("done")
"""
    run(code, tmp_path)


def test_fork_during_steps(tmp_path):
    """A step's thread may hold any lock at the fork. No child waits for it."""
    code = """
tx = paged_optax.scale_by_paged_adam8bit()
large = {"w": jnp.ones((2048, 2048))}
update = jax.jit(tx.update)
_, state = jax.block_until_ready(update(large, tx.init(large)))
stopped = False

def train():
    newest = state
    while not stopped:
        newest = jax.block_until_ready(update(large, newest))[1]

thread = threading.Thread(target=train)
thread.start()
for _ in range(10):
    assert in_child(num_arenas) == in_child(release_all) == "0"
stopped = True
thread.join()
print("done")
"""
    run(code, tmp_path)


@pytest.mark.parametrize("directory", ["None", "'.'"], ids=["plain memory", "file"])
def test_a_child_keeps_nothing_alive(tmp_path, directory):
    """Neither memory nor room on the disk."""
    code = f"""
tx = paged_optax.scale_by_paged_adam8bit(paging=Paging(directory={directory}))
large = {{"w": jnp.ones((2**25,), jnp.bfloat16)}}
_, state = jax.block_until_ready(tx.update(large, tx.init(large)))
nbytes = memory_report(state).total

def mapped():
    "Where the process maps memory, of which it may have touched only some; and its open files."
    ranges = [line.split()[0].split("-") for line in open("/proc/self/maps")]
    links = [f"/proc/self/fd/{{fd}}" for fd in os.listdir("/proc/self/fd")]
    files = [link for link in links if os.path.islink(link) and "(deleted)" in os.readlink(link)]
    return [(int(begin, 16), int(end, 16)) for begin, end in ranges], len(files)

here, files = mapped()
assert files == bool({directory})
there, files = eval(in_child(mapped))
assert files == 0
# What another thread mapped between the two does not count.
kept = sum(max(0, min(ends) - max(begins)) for begins, ends in
           (zip(one, other) for one in here for other in there))
assert sum(end - begin for begin, end in here) - kept >= nbytes
print("done")
"""
    run(code, tmp_path)
