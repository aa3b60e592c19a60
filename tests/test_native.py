"""What the host does around its devices, with a CUDA runtime made of ordinary memory.

The C++ is built once more without XLA and Python, under ThreadSanitizer: `native/program.cc` says
what it runs.
"""

import concurrent.futures
import os
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "native"
XLA_FFI = Path(__file__).parent.parent / "xla_ffi"
COMPILER = os.environ.get("CXX", "g++")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not XLA_FFI.exists(), reason="tests without the source tree"),
    pytest.mark.skipif(shutil.which(COMPILER) is None, reason="no C++ compiler"),
]

SOURCES = """
    base/crc32 base/device_buffer base/disk_file memory/file_memory memory/file_system
    memory/gpus memory/host_memory memory/managed_memory memory/memory memory/pinned_memory
    memory/planner memory/preflight memory/promises state/arena state/background_save
    state/contents state/copies state/cpu_device state/cuda_arena state/cuda_device
    state/explain state/handles state/load state/pager state/refusals state/registry state/save
    state/shards state/signature state/snapshot state/source state/tiling
""".split()
FLAGS = ["-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-fsanitize=thread", "-pthread"]
DEFINES = ["-DPAGED_OPTAX_CUDA=1", "-DPAGED_OPTAX_TESTING=1", f"-I{HERE}", f"-I{XLA_FFI}"]


def run(*command, cwd):
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=3600)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    folder = tmp_path_factory.mktemp("native")

    def compile_one(source):
        target = folder / f"{source.parent.name}_{source.stem}.o"
        run(COMPILER, *FLAGS, *DEFINES, "-c", str(source), "-o", str(target), cwd=folder)
        return str(target)

    sources = [XLA_FFI / f"{name}.cc" for name in SOURCES] + sorted(HERE.glob("*.cc"))
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    run(COMPILER, *FLAGS, *objects, "-o", str(folder / "program"), cwd=folder)
    return folder / "program"


def start(program, *arguments):
    # Without address randomisation, which some versions of ThreadSanitizer cannot do with.
    setarch = ["setarch", "-R"] if shutil.which("setarch") else []
    return run(*setarch, str(program), *arguments, cwd=program.parent)


def test_threads(program):
    """Steps, moves, questions, snapshots, resets and releases at once: no race, no loss."""
    assert "arenas left 0" in start(program, "threads", "8")


def test_every_call_fails_once(program):
    """Each call of the system and of CUDA, in turn: an error, and then everything goes on."""
    assert "arenas left 0" in start(program, "faults")


def test_room_that_comes_late(program):
    """Who waits for moments to come back does not wait for good, whoever takes memory meanwhile."""
    assert "arenas left 0" in start(program, "room")


def test_unknown_tokens(program):
    """Tokens that name no state are refused at once; a GPU once waited for that of handle 0."""
    assert "arenas left 0" in start(program, "unknown")


def test_collectives(program):
    """What waits for one GPU waits for a launch on the other, which must not wait for that."""
    assert "arenas left 0" in start(program, "collectives")


def test_saves(program):
    """A save waits for nothing that waits for it, and steps of other states go on meanwhile."""
    assert "arenas left 0" in start(program, "saves")


def test_handles(program):
    """Devices that are 5,000 inits apart agree; so do two jobs that follow each other."""
    start(program, "handles")


def test_files(program):
    """Threads that save, and load, in the background too: no race, and each call may fail once."""
    start(program, "files")
