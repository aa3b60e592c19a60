"""The examples in docstrings and on the pages of the site run."""

import ast
import doctest
import importlib
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest

import paged_optax

README = Path(__file__).parent.parent / "README.md"
DOCS = README.parent / "docs"
COMPATIBILITY = DOCS / "compatibility.md"
# Pages that need a process of their own, and those that share one.
ALONE = {name: DOCS / f"{name}.md" for name in ("checkpoints", "planning", "several_gpus")}
TOGETHER = [
    DOCS / f"{page}.md"
    for page in (
        "accumulation",
        "bfloat16",
        "from_bitsandbytes",
        "from_optax",
        "full_finetuning",
        "how_it_works",
        "monitoring",
        "optimizers",
        "start",
        "trainers",
    )
]

MODULES = ["paged_optax"] + [
    f"paged_optax.{module.name}"
    for module in pkgutil.iter_modules(paged_optax.__path__)
    if module.name not in ("__main__", "_ext")
]


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name):
    with jax.default_device(jax.devices("cpu")[0]):  # the bytes they print are a CPU's
        results = doctest.testmod(importlib.import_module(name))
    assert results.failed == 0


FUNCTIONS = [
    paged_optax.scale_by_paged_adam8bit,
    paged_optax.paged_adamw8bit,
    paged_optax.paged_adam8bit,
    paged_optax.MultiSteps,
    paged_optax.apply_gradients,
    paged_optax.moments,
    paged_optax.memory_report,
    paged_optax.save_moments,
    paged_optax.export_moments,
    paged_optax.to_optax,
    paged_optax.from_optax,
    paged_optax.plan,
    paged_optax.release,
    paged_optax.skip_non_finite,
]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_every_function_has_an_example(function):
    (test,) = doctest.DocTestFinder(recurse=False).find(function)
    assert test.examples
    for section in ("Args:", "Returns:", "Raises:", "Example:"):
        assert f"\n{section}\n" in f"\n{re.sub('^ +', '', function.__doc__, flags=re.MULTILINE)}"


def test_everything_public_has_a_docstring():
    for name in paged_optax.__all__:
        assert getattr(paged_optax, name).__doc__, name
    assert sorted(paged_optax.__all__) == paged_optax.__all__


def python_blocks(text):
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.skipif(not README.exists(), reason="tests without the source tree")
@pytest.mark.parametrize(
    ("documents", "options"),
    [
        ([ALONE["checkpoints"]], []),  # Orbax warns of its own code
        ([ALONE["planning"]], ["-W", "error"]),
        ([ALONE["several_gpus"]], ["-W", "error"]),
        (TOGETHER, ["-W", "error"]),
    ],
    ids=[*ALONE, "others"],
)
def test_documents_run(documents, options, tmp_path):
    """All Python blocks, one after the other, in a process and a folder of their own."""
    blocks = [python_blocks(document.read_text(encoding="utf-8")) for document in documents]
    assert all(blocks)
    blocks = sum(blocks, [])
    process = subprocess.run(
        [sys.executable, *options, "-c", "\n".join(blocks)],
        cwd=tmp_path,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert process.returncode == 0, process.stderr


@pytest.mark.skipif(not README.exists(), reason="tests without the source tree")
def test_every_document_with_python_runs():
    """Other programs are in blocks of ``py``: what needs a package that the tests do not have."""
    run = {*ALONE.values(), *TOGETHER}
    pages = [README, *DOCS.glob("*.md"), *DOCS.glob("reference/*.md")]
    assert {p for p in pages if python_blocks(p.read_text(encoding="utf-8"))} == run


@pytest.mark.skipif(not README.exists(), reason="tests without the source tree")
def test_documents_are_filled_in():
    """No placeholder of a number that was to be measured."""
    for path in [README, *DOCS.glob("*.md"), *README.parent.glob("xla_ffi/*.md")]:
        assert not re.findall(r"(?<!```)\{[a-z_]+\}", path.read_text(encoding="utf-8")), path


def names_in(path):
    """Names of a file's functions and classes, and its strings: parts of them are parts of ids."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    functions = {n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    attributes = {n.attr for n in nodes if isinstance(n, ast.Attribute)}
    strings = {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    return functions, functions | attributes | strings


@pytest.mark.fast
@pytest.mark.skipif(not COMPATIBILITY.exists(), reason="tests without the source tree")
def test_every_claim_of_compatibility_names_its_tests():
    tables = re.findall(
        r"^\|[^\n]*\| test \|\n\| [- |]+\n((?:^\|.*\n)+)",
        COMPATIBILITY.read_text(encoding="utf-8"),
        flags=re.MULTILINE,
    )
    assert len(tables) >= 5
    known = {}
    for row in "".join(tables).splitlines():
        names = re.findall(r"`(test_\w+\.py)::(\w+)(?:\[([^]]+)\])?`", row)
        assert names and row.split("|")[-2].count("`") == 2 * len(names), row
        for file, test, case in names:
            path = COMPATIBILITY.parent.parent / "tests" / file
            if file not in known:
                known[file] = names_in(path)
            functions, words = known[file]
            assert test in functions, f"{file}::{test}"
            assert not case or case in words, f"{file}::{test}[{case}]"


@pytest.mark.skipif(not README.exists(), reason="tests without the source tree")
def test_quickstart_is_what_the_first_page_shows():
    quickstart = (README.parent / "examples" / "quickstart.py").read_text(encoding="utf-8")
    (block,) = python_blocks((DOCS / "start.md").read_text(encoding="utf-8"))
    assert quickstart.endswith(block)


@pytest.mark.fast
@pytest.mark.skipif(not README.exists(), reason="tests without the source tree")
@pytest.mark.parametrize("page", ["README.md", "docs/start.md"])
def test_the_two_lines_work(page):
    """What the diff adds, and what it removes, each make an optimizer."""
    text = (README.parent / page).read_text(encoding="utf-8")
    (diff,) = re.findall(r"^```diff\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    for sign in "+-":
        lines = [line[1:] for line in diff.splitlines() if line[0] == sign]
        names = {"optax": optax}
        exec("\n".join(lines), names)
        params = {"w": jnp.ones((64, 64))}
        with jax.numpy_dtype_promotion("standard"):  # optax's bias correction needs it
            updates, _ = names["tx"].update(params, names["tx"].init(params), params)
        assert jnp.all(updates["w"] < 0)
