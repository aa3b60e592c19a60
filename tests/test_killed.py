"""A process that is killed while it saves: what is there afterwards is complete, and resumes."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import checkpoints
import paged_optax
from helpers import assert_trees_equal

# Imports once, and makes a process for every line of its input. Each goes on from what is there,
# and saves after every step.
PROGRAM = """
    import os, sys
    import jax
    import checkpoints, paged_optax, orbax.checkpoint

    def resume_and_save():
        make, dtype = checkpoints.RUNS["ratio"]
        tx = make()
        step, params = checkpoints.make_step(tx), checkpoints.make_params(dtype)
        with checkpoints.Saver(sys.argv[1], sys.argv[2]) as saver:
            state = saver.restore(tx.init(params))
            first = int(state[0].count)
            for i in range(first, 100_000):
                _, state = checkpoints.advance(step, params, state, i, 1)
                saver.save(i + 1, state)
                if i == first + 2:  # Orbax ends the save before when it begins another
                    print("saved", flush=True)

    for line in sys.stdin:
        child = os.fork()
        if not child:
            resume_and_save()
        print(child, flush=True)
        os.waitpid(child, 0)
        print("gone", flush=True)
"""


@pytest.mark.parametrize("way", ["file", "orbax"])
@pytest.mark.parametrize("kills", [2, pytest.param(25, marks=pytest.mark.endurance)])
def test_process_that_is_killed_while_it_saves(way, kills, tmp_path):
    """Each process resumes from the checkpoint of the one before; none of them loses a bit."""
    if way == "orbax":
        pytest.importorskip("orbax.checkpoint")
    rng = np.random.default_rng(kills)
    folder = tmp_path / "run"
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(PROGRAM), way, str(folder)],
        cwd=tmp_path,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parent)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            for _ in range(kills):
                process.stdin.write("go\n")
                process.stdin.flush()
                lines = [process.stdout.readline().strip() for _ in range(2)]
                (child,) = (int(line) for line in lines if line != "saved")
                time.sleep(float(rng.uniform(0, 0.2)))
                os.kill(child, signal.SIGKILL)
                while process.stdout.readline().strip() != "gone":
                    pass
        finally:
            process.kill()
    make, dtype = checkpoints.RUNS["ratio"]
    tx, params = make(), checkpoints.make_params(dtype)
    with checkpoints.Saver(way, folder) as saver:
        state = saver.restore(tx.init(params))
    count = int(state[0].count)
    assert count >= kills
    step = checkpoints.make_step(tx)
    whole = tx.init(params)
    for i in range(count):
        _, whole = checkpoints.advance(step, params, whole, i, 1)
    exported = [paged_optax.export_moments(jax.block_until_ready(x)) for x in (state, whole)]
    for arrays in exported:
        del arrays["paged_optax"]
    assert_trees_equal(*exported)
