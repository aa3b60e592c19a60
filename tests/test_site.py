"""What the documentation site is made of: nothing public, no error and no page is left out."""

import ast
import importlib.util
import re
import sys
from pathlib import Path

import pytest

import paged_optax

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"

pytestmark = [
    pytest.mark.fast,
    pytest.mark.skipif(not DOCS.exists(), reason="tests without the source tree"),
]


def module_of(name):
    spec = importlib.util.spec_from_file_location(name, DOCS / "_site" / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_public_name_is_on_one_page():
    public_names = module_of("public_names")
    names = [name for page in public_names.PAGES for name in public_names.names_of(page)]
    assert sorted(names) == paged_optax.__all__
    assert "paged_adamw8bit" in public_names.names_of("optimizers")
    assert "save_moments" in public_names.names_of("checkpoints")
    for page in public_names.PAGES:
        text = (DOCS / "reference" / f"{page}.md").read_text(encoding="utf-8")
        assert f"<!-- public names: {page} -->" in text


def test_modules_of_the_reference_exist():
    public_names = module_of("public_names")
    for module in sum(public_names.MODULES.values(), []):
        assert (ROOT / "paged_optax" / f"{module}.py").exists(), module


def test_error_index_has_every_error():
    """Every call of an exception with a sentence, and every StatusError, is in the list."""
    error_texts = module_of("error_texts")
    found = {(error.file, error.text) for error in error_texts.error_texts(ROOT)}
    texts = [text for _, text in found]
    for path in (ROOT / "paged_optax").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Raise) or not isinstance(node.exc, ast.Call):
                continue
            words = [c.value for c in ast.walk(node.exc) if isinstance(c, ast.Constant)]
            words = [w for w in words if isinstance(w, str) and len(w.split()) > 4]
            assert not words or any(words[0] in text for text in texts), words
    for path in (ROOT / "xla_ffi").rglob("*.cc"):
        if path.name.startswith("testing"):
            continue
        source = path.read_text(encoding="utf-8")
        for words in re.findall(r'StatusError\([^;"]*"([^"]*)"', source):
            assert len(words.split()) < 5 or any(words.strip() in text for text in texts), words


def test_troubleshooting_quotes_texts_that_exist():
    error_texts = module_of("error_texts")
    flat = [re.sub(r"\s+", " ", error.text) for error in error_texts.error_texts(ROOT)]
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    page, _ = page.split("## What has no error")
    quotes = [re.sub(r"\s+", " ", quote) for quote in re.findall(r"\*\*(.*?)\*\*", page, re.DOTALL)]
    assert len(quotes) > 25
    for quote in quotes:
        pattern = ".*".join(map(re.escape, quote.split("…")))
        assert any(re.search(pattern, text) for text in flat), quote


def test_every_public_name_is_in_the_overview():
    """The table of functions and options names everything, and nothing that is not there."""
    page = (DOCS / "overview.md").read_text(encoding="utf-8")
    names = set(re.findall(r"`([A-Za-z_0-9]+)[`(]", page))
    assert set(paged_optax.__all__) <= names | {"Quantization", "Paging"}
    assert {"Quantization(", "Paging("} <= set(re.findall(r"(?:Quantization|Paging)\(", page))
    paged = {name for name in names if name.startswith(("paged_", "scale_by_paged_", "ScaleBy"))}
    assert paged - {"paged_optax"} <= set(paged_optax.__all__)


def test_every_benchmark_is_on_its_page():
    page = (DOCS / "benchmarks.md").read_text(encoding="utf-8")
    for script in (ROOT / "benchmarks").glob("*.py"):
        assert f"`{script.name}`" in page, script.name
    for command in re.findall(r"python (benchmarks/\w+\.py)", page):
        assert (ROOT / command).exists(), command


def test_readme_is_one_screen():
    """Promise and proof. What is longer has its page on the site."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) < 80
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    for mark in re.findall(r':(?:start-after|end-before): "(.*)"', index):
        assert mark in lines


def test_links_of_readme_lead_somewhere():
    """The site checks the links of its pages, and those of README only as far as it shows them."""
    links = re.findall(r"\]\(([^)#:]+)(?:#([^)]+))?\)", (ROOT / "README.md").read_text("utf-8"))
    assert len(links) > 20
    for path, anchor in links:
        assert (ROOT / path).exists(), path
        if anchor:
            headings = re.findall(r"^#+ (.*)$", (ROOT / path).read_text("utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", h).strip().lower().replace(" ", "-") for h in headings}
            assert anchor in slugs, f"{path}#{anchor}"


def test_pictures_exist():
    """Each one that a page shows is a PNG next to it, with words for those who cannot see it."""
    shown = set()
    for page in [ROOT / "README.md", *DOCS.glob("*.md")]:
        text = page.read_text(encoding="utf-8")
        for words, path in re.findall(r"!\[([^]]*)\]\(([^)]+)\)", text):
            picture = (page.parent / path).resolve()
            assert len(words.split()) > 5, f"{page}: {path}"
            assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n", picture
            shown.add(picture)
    assert shown == {picture.resolve() for picture in DOCS.glob("*.png")}


def test_every_page_is_in_the_contents():
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    assert "<!-- other guides -->" in index
    for page in (DOCS / "reference").glob("*.md"):
        assert f"\nreference/{page.stem}\n" in index
