"""The guides "Add a ..." are complete: tables of contracts, public names, and the example of a view operation."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pages import ROOT, prose, rows, write_examples
from sslcli.backbones.base import Backbone
from sslcli.evaluation.base import FeatureProtocol, Outcome, Protocol
from sslcli.evaluation.features import FeatureSet
from sslcli.evaluation.task import Start, Task
from sslcli.methods.base import Batch, Method

NOT_FOR_AUTHORS = {"to"}  # of Batch: moves it to a device
CONTRACTS = {
    "docs/add-a-method.md": [Method, Batch],
    "docs/add-a-protocol.md": [Protocol, FeatureProtocol, FeatureSet, Start, Task, Outcome],
    "docs/add-a-backbone.md": [Backbone],
}


@pytest.mark.parametrize(
    ("page", "contract"), [(page, contract) for page, contracts in CONTRACTS.items() for contract in contracts]
)
def test_every_member_of_a_contract_is_in_a_table(page: str, contract: type) -> None:
    members = {*vars(contract), *vars(contract).get("__annotations__", {})}
    public = {name for name in members if not name.startswith("_")} | ({"__call__"} & vars(contract).keys())
    names = " ".join(row[0] for row in rows(prose(ROOT / page)))
    assert [name for name in sorted(public - NOT_FOR_AUTHORS) if not re.search(rf"`{name}[`(]", names)] == []


def test_every_public_name_can_be_imported() -> None:
    listed = [row for row in rows(prose(ROOT / "docs" / "add-a-method.md")) if row[0].startswith("`sslcli.")]
    assert len(listed) > 5
    for module, names in listed:
        for name in re.findall(r"`(\w+)", names):
            assert hasattr(importlib.import_module(module.strip("`")), name), f"{module} has no {name}"


def _diffs(text: str) -> list[str]:
    """Return the fenced diffs of a part of a page."""
    return re.findall(r"^```diff\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def _apply(diff: str, folder: Path) -> None:
    """Apply a fenced diff, whose first line is the name of a file, to that file in `folder`; it must fit once."""
    name, *lines = diff.splitlines()
    path = folder / name.removeprefix("# ")
    before = "".join(f"{line[1:]}\n" for line in lines if line[:1] != "+")
    after = "".join(f"{line[1:]}\n" for line in lines if line[:1] != "-")
    text = path.read_text("utf-8")
    assert f"\n{text}".count(f"\n{before}") == 1, f"{name} does not have these lines once:\n{before}"
    path.write_text(f"\n{text}".replace(f"\n{before}", f"\n{after}")[1:], "utf-8")


POSTERIZED = """
import torch
from torchvision.transforms.v2 import functional
from sslcli.data.views.views import Views
images = torch.rand(500, 3, 4, 4, generator=torch.Generator().manual_seed(0))
views = Views([{"flip": 0, "posterize": 0.2, "posterize_bits": 2}], normalize=False)
result = views.color(0, torch.arange(500), images, mean=[0] * 3, std=[1] * 3)
changed = (result != images).flatten(1).any(1)
assert 70 < changed.sum() < 130, changed.sum()
assert torch.equal(result[changed], functional.posterize(images[changed], 2))
print(views.describe())
"""


def test_the_view_operation_of_the_page_trains(tmp_path: Path) -> None:
    page = ROOT / "docs" / "add-a-view-operation.md"
    shutil.copytree(ROOT / "sslcli", tmp_path / "sslcli", ignore=shutil.ignore_patterns("__pycache__"))
    write_examples(page, tmp_path)
    in_torch, _, compiled = page.read_text("utf-8").partition("## 6.")
    for text in _diffs(in_torch):
        _apply(text, tmp_path)
    short = ["train.max_steps=1", "dataset.limit=32", "train.batch_size=8", "dry_run=true", "launcher.threads=1"]
    train = ["-m", "sslcli.cli.train", "--config-dir", str(tmp_path / "conf"), "views=posterized", *short]
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    for line in (["-c", POSTERIZED], train):
        done = subprocess.run([sys.executable, *line], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        assert "posterize" in done.stdout
    for text in _diffs(compiled):
        _apply(text, tmp_path)
