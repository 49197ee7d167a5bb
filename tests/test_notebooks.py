"""The notebooks run from the first to the last cell, and are stored without outputs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_has_no_outputs_and_its_links_lead_to_files(path: Path) -> None:
    cells = json.loads(path.read_text("utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    text = "".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    links = re.findall(r"\]\(([^)#\s]+)", text)
    assert links
    assert [link for link in links if not (path.parent / link).exists()] == []


def test_features_neighbors_and_map_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(ROOT / "docs" / "notebooks" / "image_features.ipynb", as_version=4)
    nbformat.validate(notebook)
    nbclient.NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown: list[Any] = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    assert "torch.Size([400, 128])" in str(shown)
    assert sum("image/png" in output.get("data", {}) for outputs in shown for output in outputs) == 4
    (line,) = [output.text for outputs in shown for output in outputs if "same class" in output.get("text", "")]
    same, chance = map(int, re.findall(r"(\d+)%", line))
    assert same >= 2 * chance
    with Image.open(tmp_path / "map.png") as picture:
        assert picture.size == (732, 732)
        assert len(picture.getcolors(1 << 20) or []) > 1000
