"""The rooms of xla_ffi and of the tests: who may include and import whom."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
XLA_FFI = ROOT / "xla_ffi"

pytestmark = [
    pytest.mark.fast,
    pytest.mark.skipif(not XLA_FFI.exists(), reason="tests without the source tree"),
]

# A file includes its own room and what is below. Rooms of one floor do not know each other.
FLOORS = [
    {"base"},
    {"rules", "formats"},
    {"layout"},
    {"step"},
    {"memory"},
    {"state"},
    {"xla"},
    {"python"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def sources():
    """Paths of the C++ and CUDA files, relative to xla_ffi."""
    found = [p for ending in ("h", "cc", "cu") for p in XLA_FFI.glob(f"*/*.{ending}")]
    return sorted(path.relative_to(XLA_FFI).as_posix() for path in found)


def includes(path):
    """The files of ours that a file includes; the first folder of each is its room."""
    text = (XLA_FFI / path).read_text(encoding="utf-8")
    return re.findall(r'^#include "(?!xla/ffi/api/)([^"]+)"', text, re.MULTILINE)


def test_every_file_is_in_a_room():
    assert {path.split("/")[0] for path in sources()} == set(FLOOR)
    known = set(sources())
    assert not [(p, include) for p in sources() for include in includes(p) if include not in known]


def test_no_include_goes_up():
    up = []
    for path in sources():
        room = path.split("/")[0]
        for include in includes(path):
            other = include.split("/")[0]
            if other != room and FLOOR[other] >= FLOOR[room]:
                up.append(f"{path} includes {include}")
    assert not up, "\n".join(up)


def test_no_includes_in_a_circle():
    """Not even inside a room."""
    done, path = set(), []

    def visit(file):
        assert file not in path, " -> ".join([*path[path.index(file) :], file])
        if file not in done:
            path.append(file)
            for include in includes(file):
                visit(include)
            path.pop()
            done.add(file)

    for file in sources():
        visit(file)


def test_every_call_of_cuda_can_be_made_to_fail():
    """It is written as CUDA_CHECK, PAGED_CUDA or CUDA_LAUNCH, which base/cuda_check.h defines."""
    exempt = {"cudaGetErrorString", "cudaGetErrorName", "cudaGetLastError"}  # ask nothing of a GPU
    others = []
    for path in sources():
        text = re.sub(r"//.*", "", (XLA_FFI / path).read_text(encoding="utf-8"))
        text = re.sub(r"#define (CUDA_LAUNCH|CUDA_CHECK)(.*\\\n)*.*", "", text)
        for match in re.finditer(r"\bcuda[A-Z]\w*(?<!_t)(?=\()", text):
            before = text[: match.start()].rstrip().removesuffix("(void)").rstrip()
            if match[0] not in exempt and not before.endswith(("CUDA_CHECK(", "PAGED_CUDA(")):
                others.append(f"{path}: {match[0]}")
        launches = len(re.findall(r"\w<<<", text))
        if launches != text.count("CUDA_LAUNCH("):
            others.append(f"{path}: a launch")
    assert not others, "\n".join(others)


def test_private_modules_are_known_to_one_file_of_tests():
    """So that a change inside the package changes helpers.py, and no test."""
    private = re.compile(
        r"(?<!`)\bpaged_optax\._[a-z]|^\s*from paged_optax import .*\b_[a-z]", re.M
    )
    files = [p for p in sorted((ROOT / "tests").glob("*.py")) if private.search(p.read_text())]
    known = {"helpers.py", "conftest.py", "test_attributes.py"}  # the last is about these modules
    assert {path.name for path in files} <= known


def test_nobody_asks_for_the_gil_of_an_interpreter_that_ended():
    """What comes back to Python is WithoutGil (python/interpreter.h) or knows InterpreterStays."""
    texts = {path: (XLA_FFI / path).read_text(encoding="utf-8") for path in sources()}
    del texts["python/testing.cc"]
    assert not [path for path, text in texts.items() if re.search(r"gil_scoped_release\b.*;", text)]
    for path, text in texts.items():
        assert text.count("gil_scoped_acquire") == len(
            re.findall(r"InterpreterStays stays;\n.*return;.*\n.*gil_scoped_acquire", text)
        ), path
