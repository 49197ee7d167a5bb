from __future__ import annotations

import json
from pathlib import Path

import pytest

from sslcli.sweeps.sweep import exit_code
from sslcli.sweeps.table import Row, as_csv, as_text, ranked, value_of


def row(status: str, *, value: float | None = None, code: int | None = 0, seed: int = 0, lr: str = "1") -> Row:
    overrides = {"seed": str(seed), "optimizer.lr": lr, "views": "[a,b]"}
    return Row(f"job{seed}", overrides, status, code, 7, value, f"job{seed}")


def test_finished_jobs_come_first_then_the_best_value_then_those_without() -> None:
    rows = [
        row("stopped", value=0.9, seed=0),
        row("finished", value=0.2, seed=1),
        row("waiting", seed=2),
        row("finished", value=0.5, seed=3),
        row("failed", value=0.95, seed=4),
        row("finished", seed=5),
    ]
    assert [r.overrides["seed"] for r in ranked(rows, lowest=False)] == ["3", "1", "5", "4", "0", "2"]
    assert [r.overrides["seed"] for r in ranked(rows, lowest=True)] == ["1", "3", "5", "0", "4", "2"]


def test_the_file_has_a_column_for_each_override_and_quotes_what_needs_it() -> None:
    other = Row("job9", {"method": "byol"}, "waiting", None, None, None, "job9")
    assert as_csv([row("finished", value=0.25), other], "monitor/knn_top1").splitlines() == [
        "seed,optimizer.lr,views,method,status,exit_code,steps,monitor/knn_top1,run_dir",
        '0,1,"[a,b]",,finished,0,7,0.25,job0',
        ",,,byol,waiting,,,,job9",
    ]
    assert as_csv([other], None).splitlines() == ["method,status,exit_code", "byol,waiting,"]


def test_the_printed_table_leaves_out_what_all_share() -> None:
    rows = [row("finished", value=0.25, seed=1), row("failed", code=3, seed=2)]
    assert [line.split() for line in as_text(rows, "monitor/knn_top1").splitlines()] == [
        ["seed", "status", "exit", "steps", "monitor/knn_top1", "run_dir"],
        ["1.", "1", "finished", "0", "7", "25.0", "%", "job1"],
        ["2", "failed", "3", "7", "-", "job2"],
    ]
    assert as_text([], "train/loss").split() == ["status", "exit", "steps", "train/loss", "run_dir"]


def test_a_value_is_the_newest_and_is_read_again_when_the_file_grew(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert value_of(tmp_path, "train/loss") is None
    for step in (1, 2):
        with path.open("a") as file:
            file.write(json.dumps({"step": step, "train/loss": step / 2}) + "\n")
        assert value_of(tmp_path, "train/loss") == step / 2


@pytest.mark.parametrize(
    ("rows", "stopped", "code"),
    [
        ([], False, 0),
        ([row("finished"), row("running"), row("submitted")], False, 0),
        ([row("finished"), row("failed", code=3)], False, 3),
        ([row("finished"), row("failed", code=2)], False, 2),
        ([row("failed", code=2), row("failed", code=1)], False, 3),
        ([row("finished"), row("interrupted", code=-9)], False, 3),
        ([row("failed", code=3), row("stopped", code=75)], False, 75),
        ([row("finished"), row("waiting", code=None)], True, 75),
        ([row("finished"), row("waiting", code=None)], False, 3),
    ],
)
def test_the_exit_code_of_a_sweep_tells_whether_to_start_it_again(rows: list[Row], stopped: bool, code: int) -> None:
    assert exit_code(rows, stopped=stopped) == code
