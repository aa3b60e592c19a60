"""What was built, against what, and what importing it does."""

import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import pytest

import paged_optax
from helpers import build_info, ext, hooks

PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"


def version_tuple(version):
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def ffi_api_of_installed_jaxlib():
    header = Path(jax.ffi.include_dir(), "xla/ffi/api/c_api.h").read_text(encoding="utf-8")
    return tuple(
        int(re.search(rf"#define XLA_FFI_API_{part} (\d+)", header).group(1))
        for part in ("MAJOR", "MINOR")
    )


@pytest.mark.fast
def test_version_is_the_distributions():
    assert paged_optax.__version__ == importlib.metadata.version("paged-optax")
    assert build_info()["version"] == paged_optax.__version__


@pytest.mark.fast
def test_changelog_begins_with_this_version():
    """A version in the making ends in .dev0, and its section says that it is unreleased."""
    changelog = Path(__file__).parent.parent / "CHANGELOG.md"
    if not changelog.exists():
        pytest.skip("tests without the source tree")
    (heading, *_) = re.findall(r"^## \[(.+)\] - (.+)$", changelog.read_text("utf-8"), re.MULTILINE)
    version, is_dev = (
        paged_optax.__version__.removesuffix(".dev0"),
        ".dev0" in paged_optax.__version__,
    )
    assert heading[0] == version
    assert (heading[1] == "unreleased") == is_dev


def test_the_extension_has_nothing_of_the_tests():
    names = [{name for name in dir(m) if not name.startswith("__")} for m in (ext, hooks)]
    assert names[1] and not names[0] & names[1]


def test_ffi_api_is_the_oldest_supported():
    """A library built with newer headers breaks the whole CPU backend of an older jax."""
    built, installed = build_info()["ffi_api"], ffi_api_of_installed_jaxlib()
    oldest = (0, 3) if sys.version_info < (3, 15) else (0, 4)
    if built == installed != oldest:
        pytest.skip(f"built without isolation, with the headers of jaxlib {jax.lib.__version__}")
    assert built == oldest


@pytest.mark.skipif(not PYPROJECT.exists(), reason="tests without the source tree")
def test_headers_are_those_of_the_oldest_jax():
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))
    (oldest,) = (r for r in project["project"]["dependencies"] if r.startswith("jax>="))
    jaxlib = f"jaxlib=={oldest.removeprefix('jax>=')}"
    assert jaxlib in {r.split(";")[0] for r in project["build-system"]["requires"]}


@pytest.mark.parametrize("package", ["jax", "numpy", "optax"])
def test_installed_requirements_are_met(package):
    requirements = importlib.metadata.requires("paged-optax")
    (line,) = (r for r in requirements if re.match(rf"{package}>=[\d.]+$", r))
    oldest = line.split(">=")[1]
    assert version_tuple(importlib.metadata.version(package)) >= version_tuple(oldest)


def test_import_starts_no_backend(tmp_path):
    """So that a program can still choose platforms and devices after its imports."""
    code = """
import jax
import paged_optax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 3)  # refused once there is a backend
assert len(jax.devices()) == 3
tx = paged_optax.paged_adamw8bit(1e-3)
params = {"w": jax.numpy.ones((64, 64))}
updates, state = tx.update(params, tx.init(params), params)
assert state[0].count == 1
"""
    environment = {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    process = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert process.returncode == 0, process.stderr
