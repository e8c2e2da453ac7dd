"""The notebooks run, and are stored without outputs."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_without_outputs(path):
    cells = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
    assert cells
    assert not [cell for cell in cells if cell.outputs or cell.execution_count is not None]


@pytest.mark.slow
def test_the_quickstart_runs_and_shows_its_results():
    notebook = nbformat.read(FOLDER / "quickstart.ipynb", 4)
    NotebookClient(notebook, timeout=600, startup_timeout=300, resources={"metadata": {"path": str(FOLDER)}}).execute()
    printed = "".join(
        o.get("text", "") for cell in notebook.cells for o in cell.get("outputs", []) if o.output_type == "stream"
    )
    assert "the same tokens: True" in printed
    assert "Cloning" not in printed

    def tokens_per_forward(name: str) -> float:
        (line,) = [line for line in printed.splitlines() if line.startswith(name)]
        return float(line.removesuffix(" tokens per forward").split()[-1])

    assert tokens_per_forward("with lookup") > tokens_per_forward("window alone") + 1
    assert tokens_per_forward("with the drafter") > tokens_per_forward("without ") + 1
