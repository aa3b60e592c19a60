"""The texts of all errors and warnings, read from the sources."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PLACE = "…"  # of a value
_STRING = re.compile(r'"((?:[^"\\\n]|\\.)*)"')


class ErrorText(NamedTuple):
    text: str
    kind: str  # the exception, as far as the source says it
    file: str  # from the root of the repository


def error_texts(root: Path) -> list[ErrorText]:
    """All texts of errors and warnings below `root`, sorted."""
    found = set()
    for path in sorted((root / "paged_optax").rglob("*.py")):
        kinds: dict[str, str] = {}
        for text, kind in _of_python(path.read_text(encoding="utf-8")):
            kinds[text] = kinds.get(text) or kind
        found |= {ErrorText(text, kinds[text], str(path.relative_to(root))) for text in kinds}
    for path in sorted((root / "xla_ffi").rglob("*.[ch]*")):
        if path.suffix in (".cc", ".h", ".cu") and not path.name.startswith("testing"):
            for text in _of_cpp(path.read_text(encoding="utf-8")):
                found.add(ErrorText(text, "", str(path.relative_to(root))))
    return sorted(found, key=lambda error: error.text.strip(PLACE + " '").lower())


def _of_python(source: str) -> Iterator[tuple[str, str]]:
    tree = ast.parse(source)
    named = {
        statement.targets[0].id: statement.value
        for statement in tree.body
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node.args:
            kind = ast.unparse(node.func).rsplit(".", 1)[-1]
            if kind.endswith(("Error", "Warning", "Refused")) and kind != "AssertionError":
                yield from _words(node.args[0], kind, named)
            elif kind == "warn":
                yield from _words(node.args[0], "warning", named)
        elif isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            for argument in node.exc.args:  # of a helper that makes the exception
                yield from _words(argument, "", named, least=4)


def _words(
    node: ast.expr, kind: str, named: dict[str, ast.expr], least: int = 2
) -> Iterator[tuple[str, str]]:
    text = _text(named.get(node.id, node) if isinstance(node, ast.Name) else node)
    if len(text.strip(PLACE + " ").split()) >= least:
        yield text, kind


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(value) for value in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left) + _text(node.right)
    return PLACE


def _of_cpp(source: str) -> Iterator[str]:
    """Literals of one statement, joined. A statement without a sentence is none."""
    source = re.sub(r"^\s*(//|#).*$", "", source, flags=re.MULTILINE)
    text, end = "", 0
    for match in _STRING.finditer(source):
        gap = source[end : match.start()]
        end = match.end()
        literal = match[1].replace(r"\"", '"').replace(r"\n", " ")
        if re.search(r"[;{}]", gap):
            if "kNews" not in gap:  # what is told of no error
                yield from _sentence(text)
            text = "" if "static_assert" in gap else literal
        else:
            text += (PLACE if gap.strip() and text else "") + literal
    if "kNews" not in source[end:]:
        yield from _sentence(text)


def _sentence(text: str) -> Iterator[str]:
    if len(re.findall(r"[a-z]{2,}", text)) >= 4 and " " in text:
        yield text.strip()


def as_markdown(root: Path) -> str:
    rows = [
        f"| {_escape(error.text)} | {error.kind} | {_escape(Path(error.file).name)} |"
        for error in error_texts(root)
    ]
    return "\n".join(["| text | raised as | in |", "| --- | --- | --- |", *rows])


def _escape(text: str) -> str:
    """Text that Markdown leaves as it is, also in a table."""
    text = re.sub(r"([*_\\\[\]$`<])", r"\\\1", re.sub(r"\s+", " ", text))
    return text.replace("|", "&#124;")
