"""Names of results and their data sets."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from command_line import Cli
from small_runs import make_folder


def test_sets_whose_folders_are_called_alike_have_results_of_their_own(
    trained: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    line = [f"run={trained}", "protocol=knn", "baselines=false", "dataset=folder", "dataset.workers=0"]
    for parent, change in (("my", 0), ("other", 255)):
        root = make_folder(tmp_path / parent / "train.v2", per_class=15, broken=0)
        for path in sorted(root.glob("*/*.png")):  # files of the same names and sizes in both
            pixels = torch.from_numpy(np.array(Image.open(path))) ^ change
            Image.fromarray(pixels.numpy()).save(path.with_suffix(".bmp"))
            path.unlink()
        for extra in (
            ["dataset.image_size=32"],
            ["dataset.image_size=32", "dataset.limit=20"],
            ["dataset.image_size=16"],
        ):
            ended = cli("ssl-eval", *line, f"dataset.root={root}", *extra)
            assert (ended.code, ended.err) == (0, "")
    found = {path.stem: json.loads(path.read_text()) for path in (trained / "eval").glob("*.json")}
    prints = {one["dataset_version"][:6] for one in found.values()}
    names = (f"knn_train.v2-{digits}{end}" for digits in prints for end in ("", "_limit-20", "_16px"))
    assert len(prints) == 2
    assert sorted(found) == sorted(names)
    assert {one["image_size"] for name, one in found.items() if name.endswith("_16px")} == {16}
    assert all(name in ended.out for name in found)  # the table has them all
