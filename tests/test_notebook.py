"""The notebook: in the repository without outputs, and it runs from top to bottom.

Here its cells run as one program. The site runs them in a kernel (`.ci/run`), where an error in a
cell is one of the build.
"""

import json
from pathlib import Path

import pytest

from helpers import run_python

NOTEBOOK = Path(__file__).parent.parent / "examples" / "quickstart.ipynb"

pytestmark = pytest.mark.skipif(not NOTEBOOK.exists(), reason="tests without the source tree")


def code_cells():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.fast
def test_no_outputs_are_stored():
    """They would be those of some machine and some day, and every run would change the file."""
    assert len(code_cells()) > 10
    for cell in code_cells():
        assert cell["outputs"] == [] and cell["execution_count"] is None


@pytest.mark.slow
def test_runs_from_top_to_bottom(tmp_path):
    pytest.importorskip("matplotlib")
    program = "\n\n".join("".join(cell["source"]) for cell in code_cells())
    printed = run_python(program, tmp_path, MPLBACKEND="agg").stdout
    for line in (
        "the same bits",
        "StateRefused: ",
        "before 320\nnewest 321",
        "freed 341,504 bytes",
    ):
        assert line in printed
