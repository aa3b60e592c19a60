"""Puts what is made from the sources where a page says ``<!-- NAME -->``."""

import re
from pathlib import Path
from typing import Any

import error_texts
import public_names

ROOT = Path(__file__).parent.parent.parent


def fill_in(app: Any, name: str, source: list[str]) -> None:
    """Sphinx's event ``source-read``."""
    makers = {
        "public names": lambda page: public_names.as_markdown(page),
        "error texts": lambda _: error_texts.as_markdown(ROOT),
        "other guides": lambda _: "\n".join(other_guides(source[0])),
    }
    source[0] = re.sub(
        r"^<!-- ([a-z ]+?)(?:: (\w+))? -->$",
        lambda match: makers[match[1]](match[2]) if match[1] in makers else match[0],
        source[0],
        flags=re.MULTILINE,
    )


def other_guides(index: str) -> list[str]:
    """Pages in docs that no table of contents names; a guide that nobody placed comes last."""
    known = {Path(line).name for line in index.splitlines()}
    pages = sorted(path.stem for path in (ROOT / "docs").glob("*.md"))
    return [page for page in pages if page not in known and page != "index"]
