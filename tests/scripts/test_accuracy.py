"""scripts/bench/accuracy.py: the runs of the default methods do not share directories."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

BENCH = Path(__file__).parents[2] / "scripts" / "bench"


def train(line: list[str], **_: Any) -> None:
    """Write the files of a run as `ssl-train` does, and refuse a directory that has a run."""
    given = dict(part.partition("=")[::2] for part in line[1:])
    run_dir = Path(given["run_dir"])
    assert given["resume"] == "never"
    assert not run_dir.exists(), f"resume is 'never', but {run_dir} contains a run"
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").write_text(yaml.safe_dump({"monitor": {"knn_images": 10_000}}))
    steps = int(given["train.max_steps"])
    record = {"step": steps, "wall": 1.0, "train/images_per_s": 1280.0, "monitor/knn_top1": 0.5}
    (run_dir / "metrics.jsonl").write_text(json.dumps(record) + "\n")


def test_both_default_methods_run_and_an_interrupted_benchmark_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(BENCH), *sys.path])
    monkeypatch.setattr(subprocess, "run", train)
    curves = {f"{method}/lightly": [[1.0, 0.4, 7]] for method in ("simclr", "moco_v2")}
    (tmp_path / "curves.json").write_text(json.dumps(curves))
    main = runpy.run_path(str(BENCH / "accuracy.py"))["main"]
    drawn: list[Path] = []
    monkeypatch.setitem(main.__globals__, "plot", lambda curves, out: drawn.append(out))  # matplotlib is optional
    train(["", "run_dir=" + str(tmp_path / "simclr"), "resume=never", "train.max_steps=9"])  # left by a killed start
    assert main([str(tmp_path / "images"), str(tmp_path), "--minutes", "1"]) == 0
    found = json.loads((tmp_path / "curves.json").read_text())
    steps = int(0.93 * 60 * 1280 / 128)
    assert {name: curve for name, curve in found.items() if "sslcli" in name} == {
        f"{method}/sslcli": [[1.0, 0.5, steps * 128]] for method in ("simclr", "moco_v2")
    }
    assert drawn == [tmp_path / "curves.svg"]
