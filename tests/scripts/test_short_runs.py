"""The table of the short runs reads the results of every protocol."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

import short_runs


def write(path: Path, protocol: str, top1: float, *, baseline: float | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    baselines = {} if baseline is None else {"baselines": {"random": numbers(baseline)}}
    path.write_text(json.dumps({"protocol": protocol, **numbers(top1), **baselines}))


def numbers(top1: float) -> dict[str, object]:
    return {"top1": top1, "interval": [top1 - 0.01, top1 + 0.01]}


def write_config(run: Path, *, backbone: str = "small", batch_size: int = 256) -> None:
    views = {"normalize": True, "color_space": "rgb", "views": [run.name]}
    config = {"backbone": backbone, "dataset": "folder", "seed": 0, "views": views, "train": {"batch_size": batch_size}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))


def test_a_row_has_the_results_of_all_protocols_whatever_settings_their_names_contain(tmp_path: Path) -> None:
    run = tmp_path / "vae"
    write(run / "eval/knn.json", "knn", 0.3, baseline=0.3)
    write(run / "eval/linear_sgd_epochs-10.json", "linear_sgd", 0.5, baseline=0.5)
    write(run / "eval/semi_1pct.json", "semi", 0.4, baseline=0.4)
    assert short_runs.result_of(run, "linear") == {}
    (run / "metrics.jsonl").write_text('{"step": 10}\n')
    write_config(run)
    knn, semi = "30.0 (29.0 to 31.0)", "40.0 (39.0 to 41.0)"
    assert short_runs.row(run) == f"| `vae` | 2,560 | {knn} | {knn} | - | - | {semi} | {semi} |"


def test_a_baseline_is_taken_from_a_run_with_the_same_untrained_network(tmp_path: Path) -> None:
    runs = [tmp_path / name for name in ("dino", "mae", "vae")]
    for run, backbone in zip(runs, ("small", "vit", "small"), strict=True):
        write(run / "eval/knn.json", "knn", 0.5, baseline={"mae": 0.2, "vae": 0.3}.get(run.name))
        write_config(run, backbone=backbone, batch_size=len(run.name))
    (tmp_path / "dino.steps").write_text("10")
    assert short_runs.baselines_of(runs[0], "knn") == {"random": numbers(0.3)}
    assert short_runs.baselines_of(runs[0], "linear") == {}
    write(runs[0] / "eval/knn.json", "knn", 0.5, baseline=0.4)
    assert short_runs.baselines_of(runs[0], "knn") == {"random": numbers(0.4)}
    assert short_runs.baselines_of(runs[1], "knn") == {"random": numbers(0.2)}


def test_the_seed_is_that_of_the_run(tmp_path: Path) -> None:
    words = short_runs.train_line("bigan", tmp_path, threads=1, seed=3)
    assert [word for word in words if word.startswith("seed=")] == ["seed=3"]
