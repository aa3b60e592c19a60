"""Programs that run as several processes of one job (`jax.distributed`), on CPU devices or GPUs."""

import contextlib
import os
import random
import socket
import subprocess
import sys
import textwrap
import time

# What a program begins with: it joins the job. Its first arguments are those that `run` gives.
JOIN = """
    import os
    import sys
    import traceback

    import jax

    index, count, port, platform, folder = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:6]
    num_devices = 4 if platform == "cpu" else 2
    if platform == "cpu":
        jax.config.update("jax_num_cpu_devices", num_devices // count)
    if count > 1:
        mine = [index] if platform == "cuda" else None
        if platform == "cpu":
            jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            f"localhost:{port}", count, index, local_device_ids=mine, initialization_timeout=600
        )
"""


def free_port():
    """A port that nobody listens on, and that no outgoing connection gets by itself."""
    while True:
        port = random.randrange(10_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("localhost", port))
            return port


def run(program, folder, platform, count, *arguments, name=""):
    """Runs a program in `count` processes; none is left behind, whatever happens.

    Args:
      program: Python, indented like `JOIN`, which goes before it.
      folder: where it runs.
      platform: cpu or cuda.
      count: how many processes; together they have four CPU devices or two GPUs.
      *arguments: `sys.argv[6:]` of each.
      name: of the logs.

    Returns:
      The exit codes, and what each process has printed.
    """
    port = free_port()
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment["JAX_PLATFORMS"] = platform
    if platform == "cuda":
        environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # this process holds memory too
        # One process and two would otherwise measure, and choose other matrix multiplications.
        environment["XLA_FLAGS"] = "--xla_gpu_autotune_level=0 --xla_gpu_deterministic_ops=true"
    logs = [open(folder / f"{name}{platform}-{count}-{i}.log", "w+") for i in range(count)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(JOIN) + textwrap.dedent(program)]
            + [str(index), str(count), str(port), platform, str(folder), *map(str, arguments)],
            cwd=folder,  # not a checkout, whose source folder would be imported
            env=environment,
            stdout=log,
            stderr=log,
        )
        for index, log in enumerate(logs)
    ]
    try:
        _wait(processes)
    finally:
        for process in processes:
            process.kill()
            process.wait()
        texts = []
        for log in logs:
            log.seek(0)
            texts.append(log.read())
            log.close()
    return [process.returncode for process in processes], texts


def _wait(processes, timeout=900, grace=30):
    """Until all have ended; once one has failed, the others have seconds: they may wait for it."""
    deadline = time.monotonic() + timeout
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        if any(process.returncode for process in processes):
            deadline = min(deadline, time.monotonic() + grace)
            grace = timeout
        time.sleep(0.05)
