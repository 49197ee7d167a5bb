"""The learning rate and the number of steps of a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from one_run import finish, make_run
from sslcli.report.metrics import read


def test_the_learning_rate_of_each_step_is_that_of_the_schedule(tmp_path: Path) -> None:
    run = make_run(
        tmp_path, "train.max_steps=8", "train.log_every_steps=1", "train.warmup_epochs=0.67", "optimizer.lr=0.8"
    )
    finish(run)
    rates = [line["train/lr"] for line in read(tmp_path / "metrics.jsonl") if "train/lr" in line]
    assert run.warmup_steps == 2
    assert rates[:3] == pytest.approx([0.0, 0.05, 0.1])
    assert rates == pytest.approx([run.lr_at(step) for step in range(8)])
    assert rates[-1] < rates[3] < rates[2]


@pytest.mark.parametrize(
    ("overrides", "total", "warmup"),
    [
        (["train.epochs=2"], 6, 1),
        (["train.epochs=2", "train.max_steps=40", "train.warmup_epochs=2"], 40, 6),
        (["train.max_steps=8", "train.warmup_epochs=2"], 8, 2),  # at most a quarter of the run
    ],
)
def test_epochs_are_counted_in_steps(tmp_path: Path, overrides: list[str], total: int, warmup: int) -> None:
    run = make_run(tmp_path, *overrides)
    run.stop.close()
    run.monitor.close()
    assert (run.total_steps, run.warmup_steps) == (total, warmup)
