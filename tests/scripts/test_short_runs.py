"""The table of the short runs reads the results of every protocol."""

from __future__ import annotations

import json
from pathlib import Path

import short_runs


def write(path: Path, protocol: str, top1: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    numbers = {"top1": top1, "interval": [top1 - 0.01, top1 + 0.01]}
    path.write_text(json.dumps({"protocol": protocol, **numbers, "baselines": {"random": numbers}}))


def test_a_row_has_the_results_of_all_protocols_whatever_settings_their_names_contain(tmp_path: Path) -> None:
    run = tmp_path / "vae"
    write(run / "eval/knn.json", "knn", 0.3)
    write(run / "eval/linear_sgd_epochs-10.json", "linear_sgd", 0.5)
    write(run / "eval/semi_1pct.json", "semi", 0.4)
    assert short_runs.result_of(run, "linear") == {}
    (run / "metrics.jsonl").write_text('{"step": 10}\n')
    (run / "config.yaml").write_text("train:\n  batch_size: 256\n")
    knn, semi = "30.0 (29.0 to 31.0)", "40.0 (39.0 to 41.0)"
    assert short_runs.row(run) == f"| `vae` | 2,560 | {knn} | {knn} | - | - | {semi} | {semi} |"
