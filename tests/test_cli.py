"""`python -m paged_optax`: a report for people, and an exit status for scripts."""

import importlib.metadata
import os
import pathlib
import shutil
import subprocess
import sys
import textwrap

import jax
import pytest

import paged_optax
from helpers import build_info

pytestmark = pytest.mark.slow


def run(tmp_path, *command, **environment):
    return subprocess.run(
        [sys.executable, "-W", "error", *(command or ("-m", "paged_optax"))],
        cwd=tmp_path,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=900,
    )


@pytest.fixture(scope="module")
def cpu_report(tmp_path_factory):
    process = run(tmp_path_factory.mktemp("cli"), JAX_PLATFORMS="cpu")
    assert process.returncode == 0, process.stderr
    assert not process.stderr
    return process.stdout


def test_says_that_it_works(cpu_report):
    assert "Paged optimizers work here." in cpu_report


def test_names_versions(cpu_report):
    lines = [line.split() for line in cpu_report.splitlines()]
    assert ["version", paged_optax.__version__] in lines
    for package in ("jax", "jaxlib", "optax", "flax"):
        assert [package, importlib.metadata.version(package)] in lines
    api = ".".join(map(str, build_info()["ffi_api"]))
    assert f"XLA FFI API {api}" in " ".join(cpu_report.split())


def test_names_what_was_built(cpu_report):
    build = build_info()
    (line,) = (line for line in cpu_report.splitlines() if line.startswith("CUDA code"))
    if build["cuda"]:
        assert build["nvcc"] in line and build["cuda_archs"] in line
    else:
        assert line.split() == ["CUDA", "code", "none"]


def test_takes_a_step_on_each_device(cpu_report, tmp_path):
    assert "step on cpu:0 works" in " ".join(cpu_report.split())
    flags = "--xla_force_host_platform_device_count=2"
    process = run(tmp_path, JAX_PLATFORMS="cpu", XLA_FLAGS=flags)
    assert process.returncode == 0
    assert "step on cpu:1 works" in " ".join(process.stdout.split())


@pytest.mark.parametrize("platforms", ["nonsense", "cuda"])
def test_without_a_device(tmp_path, platforms):
    if platforms == "cuda" and jax.default_backend() == "gpu":
        pytest.skip("there is a GPU")
    process = run(tmp_path, JAX_PLATFORMS=platforms)
    assert process.returncode == 1
    assert "Traceback" not in process.stdout + process.stderr
    assert "JAX finds no device" in process.stdout
    assert "Paged optimizers do not work here." in process.stdout


def test_with_a_step_that_fails(tmp_path):
    code = """
import runpy
import paged_optax

def fail():
    raise RuntimeError("no memory today\\nand more")

paged_optax.scale_by_paged_adam8bit = fail
runpy.run_module("paged_optax", run_name="__main__")
"""
    process = run(tmp_path, "-c", code, JAX_PLATFORMS="cpu")
    assert process.returncode == 1
    assert "a step on cpu:0 failed: no memory today" in " ".join(process.stdout.split())
    assert "Traceback" not in process.stdout + process.stderr
    assert "Paged optimizers do not work here." in process.stdout


def test_with_a_backend_that_is_neither_cpu_nor_nvidia(tmp_path):
    code = """
import runpy
import jax

jax.default_backend = lambda: "tpu"
runpy.run_module("paged_optax", run_name="__main__")
"""
    process = run(tmp_path, "-c", code, JAX_PLATFORMS="cpu")
    assert process.returncode == 1
    assert "JAX runs on tpu, which is neither a CPU nor an NVIDIA GPU" in process.stdout
    assert "Paged optimizers do not work here." in process.stdout


@pytest.mark.skipif(build_info()["cuda"], reason="this build has CUDA code")
def test_with_a_gpu_but_without_cuda_code(tmp_path):
    code = """
import runpy
import jax

jax.default_backend = lambda: "gpu"
runpy.run_module("paged_optax", run_name="__main__")
"""
    process = run(tmp_path, "-c", code, JAX_PLATFORMS="cpu")
    assert process.returncode == 1
    assert "built without CUDA. Reinstall it with PAGED_OPTAX_CUDA=ON" in process.stdout


@pytest.mark.gpu
def test_describes_the_gpu(tmp_path):
    process = run(tmp_path, JAX_PLATFORMS="")
    assert process.returncode == 0, process.stdout + process.stderr
    words = " ".join(process.stdout.split())
    for word in ("NVIDIA driver for CUDA", "GPU 0", "memory", "link", "managed memory"):
        assert word in words
    assert "step on cuda:0 works" in words


def test_in_a_source_folder_without_the_extension(tmp_path):
    """What a regular install meets in a checkout: the folder beside it comes first."""
    (tmp_path / "paged_optax").mkdir()
    for file in pathlib.Path(paged_optax.__file__).parent.glob("*.py"):
        shutil.copy(file, tmp_path / "paged_optax")
    program = """
        import sys
        # The finder of an editable install would come first.
        sys.meta_path[:] = [f for f in sys.meta_path if "Redirecting" not in type(f).__name__]
        sys.path.insert(0, "")
        import paged_optax
    """
    process = run(tmp_path, "-c", textwrap.dedent(program), JAX_PLATFORMS="cpu")
    assert process.returncode != 0
    assert "run Python from another folder or with -P" in process.stderr
