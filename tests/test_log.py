"""What the package says to those who watch: its logger, its warnings, and names for profilers."""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import paged_optax
from helpers import build_info, run_python

XLA_FFI = Path(__file__).parent.parent / "xla_ffi"


def one_step(tx):
    params = {"w": jnp.ones((256, 64))}
    return jax.jit(tx.update)(params, tx.init(params), params)[1]


def test_lines_of_the_log(caplog, tmp_path):
    """Who asks is told what is made, moved, freed, saved, restored and compiled."""
    path = str(tmp_path / "moments.safetensors")
    with caplog.at_level(logging.DEBUG, "paged_optax"):
        state = one_step(paged_optax.paged_adam8bit(1e-3))
        jax.block_until_ready(state)
        paged_optax.save_moments(state, path)
        paged_optax.load_moments(state, path)
        paged_optax.evict(state)
        paged_optax.prefetch(state)
        paged_optax.release(state)
        lines = "\n".join(record.getMessage() for record in caplog.records)
    for line in (
        r"an update is compiled: adam, 1 leaves \(1 in ratio\), output direction, on 1 device",
        r"made \d+\.\d\d KiB of moments on cpu:0",
        rf"save_moments wrote \d+\.\d\d KiB to {re.escape(path)}",
        rf"load_moments found the moments in {re.escape(path)}",
        "evict moved 0 B",
        "prefetch moved 0 B",
        r"release freed \d+\.\d\d KiB of moments, of 1 state",
    ):
        assert re.search(line, lines), line
    assert all(record.name == "paged_optax" for record in caplog.records)


def test_nobody_who_does_not_ask_is_told(tmp_path):
    """Nothing is printed, also where the root logger shows its warnings."""
    process = run_python(
        """
        import logging; logging.basicConfig()
        import jax.numpy as jnp, paged_optax
        tx = paged_optax.paged_adam8bit(1e-3)
        params = {"w": jnp.ones((256, 64))}
        _, state = tx.update(params, tx.init(params), params)
        paged_optax.evict(state)
        paged_optax.release(state)
        """,
        tmp_path,
    )
    assert "paged_optax" not in process.stdout + process.stderr


def begin_anew():
    """Steps the initial state again, of which a warning tells."""
    tx = paged_optax.paged_adam8bit(1e-3)
    params = {"w": jnp.ones((256, 64))}
    initial = state = tx.init(params)
    for _ in range(3):
        _, state = tx.update(params, state, params)
    tx.update(params, initial, params)


@pytest.mark.parametrize(
    ("level", "count"), [("NOTSET", 1), ("INFO", 1), ("WARNING", 1), ("ERROR", 0), ("CRITICAL", 0)]
)
def test_the_level_is_the_switch_of_warnings_too(level, count):
    logger = logging.getLogger("paged_optax")
    before = logger.level
    try:
        logger.setLevel(level)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            begin_anew()
    finally:
        logger.setLevel(before)
    assert len([w for w in caught if "paged_optax" in str(w.message)]) == count


def test_report_as_numbers():
    report = paged_optax.memory_report(one_step(paged_optax.paged_adam8bit(1e-3)))
    numbers = report.to_dict()
    assert json.loads(json.dumps(numbers)) == numbers
    assert all(type(value) in (int, float) for value in numbers.values())
    assert numbers["moments/total"] == report.total > 0
    assert numbers["moments/elsewhere"] == 0
    (device,) = report.devices
    for name in ("total", "resident", "on_host", "replay", "moved", "moving_seconds", "evicted"):
        assert numbers[f"moments/{device.device}/{name}"] == getattr(device, name)
    assert set(report.to_dict("")) == {name.removeprefix("moments/") for name in numbers}


def test_report_leaves_out_what_is_not_known():
    """Of a GPU there is more: budget, free memory and pool."""
    device = paged_optax.DeviceMemory("cuda:3", 10, 4, budget=8, free=5, pool=None, evicted=True)
    numbers = paged_optax.MemoryReport((device,)).to_dict("m/")
    assert numbers["m/cuda:3/on_host"] == 6
    assert numbers["m/cuda:3/budget"] == 8
    assert numbers["m/cuda:3/free"] == 5
    assert numbers["m/cuda:3/evicted"] == 1
    assert not [name for name in numbers if "pool" in name or "memory" in name]


@pytest.mark.parametrize(
    ("tx", "name"),
    [
        (paged_optax.paged_adamw8bit(1e-3), "paged_adam"),
        (paged_optax.paged_lion8bit(1e-3, param_rounding="compensated"), "paged_lion"),
    ],
    ids=["adamw", "lion"],
)
def test_operations_of_an_update_carry_its_name(tx, name):
    params = {"w": jnp.ones((256, 64))}
    program = jax.jit(tx.update).lower(params, tx.init(params), params).compile().as_text()
    names = re.findall(r'op_name="([^"]*paged_optax_update_call[^"]*)"', program)
    assert names
    assert all(f"/{name}/" in path for path in names)


@pytest.mark.slow
def test_profile_of_jax_has_the_names(tmp_path):
    """jax.profiler writes what the host did; TensorBoard and xprof show it."""
    tx = paged_optax.paged_adam8bit(1e-3)
    with jax.profiler.trace(str(tmp_path)):
        state = one_step(tx)
        paged_optax.evict(state)
        paged_optax.memory_report(state)
        paged_optax.moments(state)
    (profile,) = tmp_path.rglob("*.xplane.pb")
    names = profile.read_bytes()
    for name in ("evict", "memory_report", "moments"):
        assert f"paged_optax.{name}".encode() in names


def nvtx_folder():
    """Where NVTX's headers are, or None: of a CUDA toolkit, or of the wheel nvidia-nvtx."""
    nvcc = shutil.which("nvcc")
    folders = [Path(path, "nvidia/cu13/include") for path in sys.path]
    folders += [Path(nvcc).resolve().parents[1] / "include"] if nvcc else []
    folders += [Path("/usr/local/cuda/include")]
    return next((f for f in folders if (f / "nvtx3/nvToolsExt.h").exists()), None)


# What a profiler does: it takes the functions' places in NVTX's table.
PROFILER = """
#include <cstdio>
#include <nvtx3/nvToolsExt.h>

static int Push(const char* name) { return std::printf("%s\\n", name); }
static int Pop() { return std::printf("end\\n"); }

extern "C" int InitializeInjectionNvtx2(NvtxGetExportTableFunc_t get) {
  auto* callbacks = static_cast<const NvtxExportTableCallbacks*>(get(NVTX_ETID_CALLBACKS));
  NvtxFunctionTable table;
  unsigned size;
  if (!callbacks->GetModuleFunctionTable(NVTX_CB_MODULE_CORE, &table, &size)) return 0;
  *table[NVTX_CBID_CORE_RangePushA] = reinterpret_cast<NvtxFunctionPointer>(&Push);
  *table[NVTX_CBID_CORE_RangePop] = reinterpret_cast<NvtxFunctionPointer>(&Pop);
  return 1;
}
"""
PROGRAM = """
#include <cstdio>
#include <ctime>

#include "base/trace.h"

int main() {
  { paged_optax::TraceRange range("paged_optax: step"); }
  const std::clock_t start = std::clock();
  for (int i = 0; i < 1000000; ++i) paged_optax::TraceRange range("again");
  std::fprintf(stderr, "%f", double(std::clock() - start) / CLOCKS_PER_SEC);
}
"""


@pytest.mark.slow
@pytest.mark.skipif(not XLA_FFI.exists(), reason="tests without the source tree")
@pytest.mark.skipif(nvtx_folder() is None, reason="no headers of NVTX")
def test_profilers_of_nvidia_see_ranges(tmp_path):
    """A library in the place of a profiler gets the names; without one, a range takes no time."""
    flags = ["g++", "-std=c++17", "-O2", "-DPAGED_OPTAX_CUDA=1", f"-I{XLA_FFI}"]
    flags += ["-isystem", str(nvtx_folder())]
    for name, text, more in (
        ("profiler", PROFILER, ["-shared", "-fPIC"]),
        ("program", PROGRAM, []),
    ):
        (tmp_path / f"{name}.cc").write_text(text)
        command = [*flags, *more, f"{name}.cc", "-o", name, "-ldl"]
        subprocess.run(command, cwd=tmp_path, check=True)
    program = str(tmp_path / "program")
    libraries = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    assert "nvtx" not in libraries.lower()

    env = {**os.environ, "NVTX_INJECTION64_PATH": str(tmp_path / "profiler")}
    seen = subprocess.run([program], env=env, capture_output=True, text=True, check=True).stdout
    assert seen.splitlines()[:3] == ["paged_optax: step", "end", "again"]

    del env["NVTX_INJECTION64_PATH"]
    alone = subprocess.run([program], env=env, capture_output=True, text=True, check=True)
    assert not alone.stdout
    assert float(alone.stderr) < 1  # of a million ranges


@pytest.mark.gpu
def test_steps_and_moves_are_ranges(tmp_path):
    """The same profiler, in a process that steps on a GPU and moves moments."""
    if not build_info()["nvtx"] or nvtx_folder() is None:
        pytest.skip("built without NVTX, or no headers for the test's profiler")
    (tmp_path / "profiler.cc").write_text(PROFILER.replace("std::printf(", "std::fprintf(stderr, "))
    command = ["g++", "-std=c++17", "-shared", "-fPIC", "-isystem", str(nvtx_folder())]
    subprocess.run([*command, "profiler.cc", "-o", "profiler"], cwd=tmp_path, check=True)
    code = """
import jax, jax.numpy as jnp, paged_optax
tx = paged_optax.scale_by_paged_adam8bit()
grads = {"w": jnp.ones((2048, 2048))}
_, state = jax.jit(tx.update)(grads, tx.init(grads))
paged_optax.evict(state)
paged_optax.prefetch(state)
"""
    env = {**os.environ, "NVTX_INJECTION64_PATH": str(tmp_path / "profiler")}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    for name in ("step", "moments to the host", "moments to the GPU"):
        assert f"paged_optax: {name}\n" in result.stderr
