"""The kernels' own source on a CPU: emulated threads of a GPU beside blocks taken one by one.

`emulated/kernel.cc` says what is compared. It shows that the kernels find, load and store what they
should, in every dtype, at any address. What a GPU's instructions return is shown by the tests that
run on one.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "emulated"
XLA_FFI = Path(__file__).parent.parent / "xla_ffi"
COMPILER = os.environ.get("CXX", "g++")
FLAGS = "-std=c++17 -O1 -ffp-contract=off -Wall -Wextra -Wno-unknown-pragmas".split()

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not XLA_FFI.exists(), reason="tests without the source tree"),
    pytest.mark.skipif(shutil.which(COMPILER) is None, reason="no C++ compiler"),
]


def test_kernels_take_the_steps_of_the_cpu(tmp_path):
    """Results, codes, words and residuals agree in every bit, and nothing else is written."""
    sources = [str(source) for source in sorted(HERE.glob("*.cc"))]
    command = [COMPILER, *FLAGS, f"-I{HERE}", f"-I{XLA_FFI}", *sources, "-o", "kernel"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=3600)
    result = subprocess.run("./kernel", cwd=tmp_path, capture_output=True, text=True, timeout=3600)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("equal") == 13
