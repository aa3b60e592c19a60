"""PEP 517 backend: scikit-build-core, plus NVIDIA's compiler from PyPI where the machine has none.

pip calls the hooks; CMakeLists.txt runs this file as a script, so that both agree on the compiler:

    python build_backend.py nvcc      prints "<path>;<version>;<where it was found>", or nothing
    python build_backend.py jaxlib    prints "<include directory>;<version>", or nothing

What was passed over, and why, goes to stderr. Only the hooks may import scikit-build-core: the
script runs in any Python.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# The first nvcc that compiles for sm_100 and sm_120.
OLDEST_NVCC = (12, 8)

# A whole compiler in 270 MB. Compiling needs neither a GPU nor a driver.
NVIDIA_WHEELS = [
    "nvidia-cuda-nvcc==13.0.*",
    "nvidia-cuda-runtime==13.0.*",
    "nvidia-cuda-cccl==13.0.*",
    "nvidia-cuda-crt==13.0.*",
    "nvidia-nvvm==13.0.*",
    "nvidia-nvtx==13.0.*",  # headers; without them profilers see no names
]

# One file of each wheel: jax[cuda13] installs nvcc's package too, for its ptxas, without the rest.
NVIDIA_FILES = [
    "bin/nvcc",
    "lib/libcudart_static.a",
    "include/cccl/nv/target",
    "include/crt/host_config.h",
    "nvvm/bin/cicc",
]


def cuda_setting(config_settings: dict[str, Any] | None = None) -> str:
    """AUTO, ON or OFF, from `-C cmake.define.PAGED_OPTAX_CUDA=` before the environment."""
    for prefix in ("", "skbuild."):
        value = (config_settings or {}).get(f"{prefix}cmake.define.PAGED_OPTAX_CUDA")
        if value is not None:
            return str(value).upper()
    return os.environ.get("PAGED_OPTAX_CUDA", "").upper() or "AUTO"


def nvidia_publishes_nvcc() -> bool:
    """Whether PyPI has the compiler for this platform."""
    return (
        sys.platform == "linux"
        and platform.machine() in ("x86_64", "aarch64")
        and platform.libc_ver()[0] == "glibc"
    )


def nvcc_version(nvcc: str) -> str:
    """Such as "13.0.88", or "" if this is no nvcc that runs."""
    try:
        out = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
    match = re.search(r"\bV(\d+\.\d+\.\d+)", out)
    return match.group(1) if match else ""


def nvcc_of_machine() -> Iterator[tuple[str, str]]:
    """(path, where from), the most explicit first."""
    if os.environ.get("CUDACXX"):
        nvcc = os.environ["CUDACXX"]
        yield shutil.which(nvcc) or nvcc, "CUDACXX"
        return
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        nvcc = Path(os.environ.get(variable, ""), "bin", "nvcc")
        if os.environ.get(variable) and nvcc.exists():
            yield str(nvcc), variable
    nvcc_on_path = shutil.which("nvcc")
    if nvcc_on_path:
        yield nvcc_on_path, "PATH"


def nvcc_of_wheels() -> Iterator[tuple[str, str]]:
    """As nvcc_of_machine, in the site directories of this Python."""
    try:
        spec = importlib.util.find_spec("nvidia.cu13")
    except ModuleNotFoundError:  # no package called nvidia
        return
    folders = spec.submodule_search_locations if spec else None
    for root in map(Path, folders or ()):
        missing = [name for name in NVIDIA_FILES if not (root / name).exists()]
        if not missing:
            yield str(root / "bin/nvcc"), "NVIDIA's wheels"
        elif "bin/nvcc" not in missing:
            print(f"passed over {root}: it has no {', '.join(missing)}", file=sys.stderr)


def first_usable(candidates: Iterator[tuple[str, str]]) -> tuple[str, str, str] | None:
    """(path, version, where from) of the first nvcc that runs and is new enough."""
    for nvcc, source in candidates:
        version = nvcc_version(nvcc)
        if version and tuple(map(int, version.split(".")[:2])) >= OLDEST_NVCC:
            return nvcc, version, source
        oldest = ".".join(map(str, OLDEST_NVCC))
        why = f"it is {version} and {oldest} is needed" if version else "it does not run"
        print(f"passed over {nvcc} (from {source}): {why}", file=sys.stderr)
    return None


def find_nvcc() -> tuple[str, str, str] | None:
    """The machine's nvcc, else the wheels'; one named in CUDACXX has no substitute."""
    found = first_usable(nvcc_of_machine())
    if found is None and not os.environ.get("CUDACXX"):
        found = first_usable(nvcc_of_wheels())
    return found


def find_jaxlib() -> tuple[str, str] | None:
    """jax.ffi.include_dir() and jaxlib's version, without importing either package."""
    spec = importlib.util.find_spec("jaxlib")
    if spec is None or not spec.submodule_search_locations:
        return None
    include = Path(spec.submodule_search_locations[0], "include")
    return str(include), importlib.metadata.version("jaxlib")


def extra_requirements(config_settings: dict[str, Any] | None) -> list[str]:
    """NVIDIA's wheels, if CUDA is wanted, this platform has them and this machine no nvcc."""
    if cuda_setting(config_settings) in ("OFF", "FALSE", "NO", "0") or os.environ.get("CUDACXX"):
        return []
    if not nvidia_publishes_nvcc() or first_usable(nvcc_of_machine()) is not None:
        return []
    return NVIDIA_WHEELS


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    import scikit_build_core.build as backend

    return backend.get_requires_for_build_wheel(config_settings) + extra_requirements(
        config_settings
    )


def get_requires_for_build_editable(config_settings: dict[str, Any] | None = None) -> list[str]:
    import scikit_build_core.build as backend

    return backend.get_requires_for_build_editable(config_settings) + extra_requirements(
        config_settings
    )


def __getattr__(name: str) -> Any:
    """The other hooks are scikit-build-core's own."""
    import scikit_build_core.build as backend

    return getattr(backend, name)


if __name__ == "__main__":
    found = {"nvcc": find_nvcc, "jaxlib": find_jaxlib}[sys.argv[1]]()
    print(";".join(found or ()), end="")
