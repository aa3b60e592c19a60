"""The examples in docstrings and on the pages of the site run."""

import ast
import doctest
import importlib
import inspect
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
        "refused",  # first, while there is one state
        "accumulation",
        "bfloat16",
        "from_bitsandbytes",
        "from_optax",
        "full_finetuning",
        "how_it_works",
        "monitoring",
        "optimizers",
        "paging",
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


PUBLIC = {name: getattr(paged_optax, name) for name in paged_optax.__all__}
FUNCTIONS = {name: value for name, value in PUBLIC.items() if inspect.isfunction(value)}
CLASSES = {name: value for name, value in PUBLIC.items() if inspect.isclass(value)}
CANNOT_FAIL = {"release_all", "states", "use_orbax_hook"}
FROM_PAPERS = {"Quantization", "from_bitsandbytes", "to_bitsandbytes"}


def sections_of(value):
    """Names of a docstring's sections, with their lines."""
    parts = re.split(r"^([A-Z][a-z]+):$", inspect.getdoc(value), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def has_example(value):
    (test,) = doctest.DocTestFinder(recurse=False).find(value)
    return bool(test.examples)


@pytest.mark.fast
@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_says_all_of_itself(name):
    """What goes in, with every argument by its name; what comes out; what is raised; an example."""
    function = FUNCTIONS[name]
    signature = inspect.signature(function)
    sections = sections_of(function)
    for argument in signature.parameters:
        assert re.search(rf"^  \*{{0,2}}{argument}[:,\s]", sections["Args"], re.MULTILINE), argument
    if signature.return_annotation is not None:
        assert sections["Returns"].strip()
    assert name in CANNOT_FAIL or sections["Raises"].strip()
    assert has_example(function)
    if "paging" in signature.parameters or name in FROM_PAPERS:
        assert "http" in sections["References"]


@pytest.mark.fast
@pytest.mark.parametrize("name", CLASSES)
def test_every_class_says_all_of_itself(name):
    """What each field is. What users make themselves has an example as well."""
    value = CLASSES[name]
    fields = getattr(value, "_fields", None) or getattr(value, "__dataclass_fields__", ())
    attributes = sections_of(value).get("Attributes", "")
    for field in fields:
        assert re.search(rf"^  {field}:", attributes, re.MULTILINE), field
    if name in ("MultiSteps", "Paging", "Quantization"):
        assert has_example(value)
        assert sections_of(value)["Raises"].strip()
    if name in FROM_PAPERS:
        assert "http" in sections_of(value)["References"]


def test_everything_public_has_a_docstring():
    for name, value in PUBLIC.items():
        assert value.__doc__, name
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
        text = re.sub(r"```\w+\n.*?```", "", path.read_text(encoding="utf-8"), flags=re.S)
        assert not re.findall(r"(?<!```)\{[a-z_]+\}", text), path


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
