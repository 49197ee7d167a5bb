from __future__ import annotations

import runpy

import pytest

from pages import ROOT, blocks
from sslcli.config.settings import EXPORT_FORMATS
from sslcli.weights.export.formats import TARGETS

PAGE = ROOT / "docs" / "export.md"
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "export_table.py"))


def test_the_setting_names_the_formats() -> None:
    assert ("torch", *TARGETS) == EXPORT_FORMATS
    assert all(target.name == name for name, target in TARGETS.items())


def test_the_table_says_which_backbones_each_format_has() -> None:
    page = PAGE.read_text("utf-8")
    assert SCRIPT["with_table"](page) == page, "run: python scripts/export_table.py"
    names = [path.stem for path in (ROOT / "conf" / "backbone").glob("*.yaml")]
    rows = [line for line in SCRIPT["table"]().splitlines() if line.startswith("| `")]
    assert [name for name in names if not any(row.startswith(f"| `{name}` ") for row in rows)] == []


def test_the_formats_of_resnets_and_vision_transformers() -> None:
    table = SCRIPT["table"]()
    assert "| `resnet18` | yes | yes | yes | yes | yes | yes |" in table
    assert "| `vit_tiny` | yes | yes | no (1) | yes | yes | yes |" in table


@pytest.mark.parametrize("name", TARGETS)
def test_the_page_shows_how_to_load_a_format(name: str) -> None:
    backbone = "vit_tiny" if name == "hf" else "resnet18"
    usage = TARGETS[name].usage(SCRIPT["trained"](backbone, {}, 224, "meta"))
    assert usage in [text for _, text in blocks(PAGE)]
