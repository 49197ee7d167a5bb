from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from command_line import Cli


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    """Color and depth of 24 images of two classes; one depth is absent and one color image broken."""
    random = np.random.default_rng(0)
    for number in range(24):
        for modality, shape in (("rgb", (20, 20, 3)), ("depth", (20, 20))):
            path = tmp_path / "scenes" / modality / "ab"[number % 2] / f"{number:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(256, size=shape, dtype=np.uint8)).save(path)
    (tmp_path / "scenes" / "depth" / "a" / "04.png").unlink()
    (tmp_path / "scenes" / "rgb" / "b" / "07.png").write_bytes(b"<html>")
    return tmp_path / "scenes"


def test_a_run_on_two_modalities_trains_and_is_evaluated(scenes: Path, tmp_path: Path, cli: Cli) -> None:
    run_dir = tmp_path / "run"
    command = ["method=simclr", "dataset=parallel", f"dataset.root={scenes}", "dataset.image_size=16"]
    command += ["dataset.modalities.depth.optional=true", "dataset.val_fraction=0.25", "dataset.max_bad=0.2"]
    command += ["train.batch_size=8", "train.max_steps=4", "monitor.knn_every_epochs=1", "launcher.threads=1"]
    ended = cli("ssl-train", *command, f"run_dir={run_dir}")
    assert ended.code == 2
    assert "which have 4 channels" in ended.err
    ended = cli("ssl-train", *command, "backbone.in_channels=4", "dataset.workers=1", f"run_dir={run_dir}")
    assert ended.code == 0, ended.err
    assert (run_dir / "views.png").exists()
    metrics = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert any("knn" in name for line in metrics for name in line)
    ended = cli("ssl-eval", f"run={run_dir}", "protocol=knn", "protocol.k=3")
    assert ended.code == 0, ended.err
