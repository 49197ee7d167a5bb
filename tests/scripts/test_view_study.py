"""scripts/view_study.py: what it reads, computes and draws."""

from __future__ import annotations

import csv
import json
import math
import os
import runpy
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml

from sslcli.nn.contrastive import info_nce

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "view_study.py"
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def study() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


def make_run(folder: Path, name: str, *, strength: float, knn: float, loss: float, negatives: int | None = 63) -> None:
    run = folder / name
    run.mkdir(parents=True)
    (run / "done").touch()
    effective = {} if negatives is None else {"negatives per query": negatives}
    config = {"views": {"strength": strength, "views": [{"rand_augment": 2}]}, "effective": effective}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    lines: list[dict[str, float]] = [
        {"step": 1, "epoch": 0.5, "train/loss": 9.0, "monitor/knn_top1": 0.0},
        {"step": 3, "epoch": 1.5, "train/loss": loss - 0.5},
        {"step": 4, "epoch": 2.0, "train/loss": loss + 0.5, "monitor/knn_top1": knn},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize("temperature", [0.05, 0.2, 1.0])
@pytest.mark.parametrize("negatives", [1, 30, 4096])
def test_the_information_never_exceeds_ln_k_and_that_of_chance_is_none(
    study: dict[str, Any], temperature: float, negatives: int
) -> None:
    point = study["Point"]
    generator = torch.Generator().manual_seed(0)
    query, other, queue = (
        F.normalize(torch.randn(rows, 512, generator=generator), dim=1) for rows in (200, 200, negatives)
    )
    chance = info_nce(query, other, queue, temperature=temperature).loss
    perfect = info_nce(query, query, queue, temperature=temperature).loss
    collapsed = info_nce(query, query, query[:1].expand(negatives, -1) * 0, temperature=1e9).loss
    for loss in (chance, perfect, collapsed):
        assert point(0.0, 0.5, float(loss), negatives + 1).information <= math.log(negatives + 1)
    if temperature == 1.0:
        assert abs(point(0.0, 0.5, float(chance), negatives + 1).information) < 0.02
    assert abs(point(0.0, 0.5, float(collapsed), negatives + 1).information) < 1e-5
    if temperature == 0.05:
        assert point(0.0, 0.5, float(perfect), negatives + 1).information > math.log(negatives + 1) - 0.01


def test_runs_are_read_sorted_averaged_and_drawn(
    study: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path, "b", strength=1.0, knn=0.6, loss=1.0)
    make_run(tmp_path, "c", strength=1.0, knn=0.7, loss=2.0)
    make_run(tmp_path, "a", strength=0.25, knn=0.4, loss=0.5)
    make_run(tmp_path, "unfinished", strength=2.0, knn=0.4, loss=0.5)
    (tmp_path / "unfinished" / "done").unlink()
    assert study["main"](["--plot", str(tmp_path)]) == 0
    rows = list(csv.DictReader((tmp_path / "view_study.csv").open()))
    assert [(float(row["value"]), float(row["knn_top1"])) for row in rows] == [(0.25, 0.4), (1.0, 0.6), (1.0, 0.7)]
    assert [float(row["loss"]) for row in rows] == [0.5, 1.0, 2.0]  # of the last epoch alone
    for row in rows:
        assert float(row["i_nce"]) == pytest.approx(math.log(64) - float(row["loss"]))
    image = ElementTree.parse(tmp_path / "view_study.svg").getroot()
    assert len(image.findall(f"{SVG}polyline")) == 2
    assert len(image.findall(f"{SVG}circle")) == 4  # two values in two panels
    texts = [element.text for element in image.findall(f"{SVG}text")]
    assert "views.strength" in texts
    assert f"I_NCE in nats, at most ln 64 = {math.log(64):.2f}" in texts
    higher, lower = (float(circle.get("cy", "")) for circle in image.findall(f"{SVG}circle")[1::-1])
    assert higher < lower  # 65 % above 40 %
    assert "views.strength=0.25  k-NN 40.0 %" in capsys.readouterr().out


def test_another_key_is_found_in_lists(study: dict[str, Any], tmp_path: Path) -> None:
    make_run(tmp_path, "a", strength=0.25, knn=0.4, loss=0.5)
    (point,) = study["points_of"](tmp_path, "views.views.0.rand_augment")
    assert point.value == 2
    assert study["points_of"](tmp_path, "views.views.1.rand_augment") == []
    assert study["points_of"](tmp_path, "optimizer.lr") == []


def test_a_folder_without_runs_and_runs_without_negatives_end_with_a_message(
    study: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert study["main"](["--plot", str(tmp_path)]) == 2
    assert "no finished run" in capsys.readouterr().err
    make_run(tmp_path, "a", strength=0.25, knn=0.4, loss=0.5, negatives=None)
    with pytest.raises(SystemExit, match="choose a contrastive method"):
        study["main"](["--plot", str(tmp_path)])


@pytest.mark.parametrize("values", [[0.0, 1.0], [0.0], [3.2, 3.9, 3.3], [0.125, 1.5], [-2.0, 40.0]])
def test_ticks_are_few_round_and_in_range(study: dict[str, Any], values: list[float]) -> None:
    found = study["ticks"](values)
    assert 1 <= len(found) <= 7
    assert min(values) - 1e-9 <= min(found) <= max(found) <= max(values) + 1e-9


def test_the_script_trains_the_sweep_and_draws_it(tmp_path: Path) -> None:
    folder = tmp_path / "study"
    small = ["dataset.limit=160", "dataset.test_images=0", "train.batch_size=32", "train.max_steps=3"]
    line = [sys.executable, str(SCRIPT), "--values", "0,1", "--dir", str(folder), *small, "launcher.threads=1"]
    ended = subprocess.run(
        line, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    rows = list(csv.DictReader((folder / "view_study.csv").open()))
    assert [float(row["value"]) for row in rows] == [0.0, 1.0]
    assert [int(row["candidates"]) for row in rows] == [63, 63]
    assert all(float(row["i_nce"]) <= math.log(63) for row in rows)
    assert (folder / "view_study.svg").exists()
