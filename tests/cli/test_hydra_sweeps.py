"""Sweeps through other launchers and sweepers of Hydra."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import yaml

from command_line import Cli
from small_sweeps import column, signal_when_started, table

HERE = ["device=cpu", "hydra.sweep.dir=here", "-m"]
OPTUNA = [*HERE, "hydra/sweeper=optuna", "hydra.sweeper.n_trials=4"]


@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_another_launcher_runs_the_jobs_that_are_due_and_one_that_fails_stops_nobody(
    launcher: str, quick_jobs: None, cli: Cli, tmp_path: Path
) -> None:
    line = ["ssl-train", *HERE, "seed=3,0,4,1", f"hydra/launcher={launcher}", "sweep.jobs=2"]
    if launcher == "joblib":
        line.append("hydra.launcher.n_jobs=2")
    ended = cli(*line)
    assert ended.code == 3
    here = tmp_path / "here"
    status = {"0": "finished", "1": "finished"}
    assert column(here, "status") == {"3": "failed", "4": "interrupted", **status}
    ended = cli(*line)
    assert "2 finished, 1 interrupted; 1 to run" in ended.out.replace("1 failed, ", "")
    assert column(here, "status") == {"3": "failed", "4": "finished", **status}
    assert cli(*line, "sweep.retry_failed=true").code == 0


def test_a_signal_reaches_jobs_that_another_launcher_started(quick_jobs: None, cli: Cli, tmp_path: Path) -> None:
    signal_when_started(signal.SIGTERM, tmp_path / "here", starts=1)
    line = ["ssl-train", *HERE, "seed=5,0", "hydra/launcher=joblib", "hydra.launcher.n_jobs=1"]
    ended = cli(*line)
    assert ended.code == 75
    assert column(tmp_path / "here", "status") == {"5": "stopped", "0": "waiting"}
    assert cli(*line).code == 0


def test_optuna_gets_the_metric_as_its_objective_and_draws_the_same_again(
    quick_jobs: None, cli: Cli, tmp_path: Path
) -> None:
    line = ["ssl-train", *OPTUNA, "seed=range(0,3)", "optimizer.lr=interval(0.1,0.2)", "sweep.jobs=2"]
    ended = cli(*line)
    assert ended.code == 0
    here = tmp_path / "here"
    rows = table(here)
    assert len(rows) == 4
    best = yaml.safe_load((here / "optimization_results.yaml").read_text())
    best_rates = [row["optimizer.lr"] for row in rows if row["monitor/knn_top1"] == rows[0]["monitor/knn_top1"]]
    assert best["best_value"] == float(rows[0]["monitor/knn_top1"])
    assert str(best["best_params"]["optimizer.lr"]) in best_rates
    assert cli(*line).code == 0
    assert table(here) == rows
    assert all(len(path.read_text().splitlines()) == 1 for path in here.glob("*/starts"))
    lowest = cli(*line, "sweep.metric=train/loss")
    assert lowest.code == 0
    assert f"best_value: {table(here)[0]['train/loss']}" in (here / "optimization_results.yaml").read_text()


def test_a_job_that_fails_does_not_end_a_sweep_of_optuna(quick_jobs: None, cli: Cli, tmp_path: Path) -> None:
    ended = cli("ssl-train", *OPTUNA, "seed=choice(1,3)", "optimizer.lr=interval(0.1,0.2)")
    assert ended.code == 3
    assert set(column(tmp_path / "here", "status").values()) == {"finished", "failed"}
    assert len(table(tmp_path / "here")) == 4
    assert "best_value: 0.1" in (tmp_path / "here/optimization_results.yaml").read_text()


def test_a_signal_ends_a_sweep_of_optuna_and_the_same_command_goes_on(
    quick_jobs: None, cli: Cli, tmp_path: Path
) -> None:
    signal_when_started(signal.SIGTERM, tmp_path / "here", starts=1)
    line = ["ssl-train", *OPTUNA, "seed=choice(5)", "optimizer.lr=interval(0.1,0.2)", "sweep.jobs=1"]
    assert cli(*line).code == 75
    assert [row["status"] for row in table(tmp_path / "here")] == ["stopped"]
    signal_when_started(signal.SIGTERM, tmp_path / "here", starts=3)  # the first one again, which ends, and another
    assert cli(*line).code == 75
    assert [row["status"] for row in table(tmp_path / "here")] == ["finished", "stopped"]


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        (["hydra/sweeper=optuna", "method=byol,mocooo"], "'moco"),
        (["hydra/sweeper=optuna", "optimizer.lr=interval(-1,0)", "train.epochs=interval(0,4)"], "train.epochs"),
        (["hydra/sweeper=optuna", "optimizer.lr=0.1,x"], "optimizer.lr is 'x'"),
        (["hydra/sweeper=optuna", "seed=0,1", "hydra.sweeper.direction=sideways"], "minimize"),
        (["hydra/sweeper=optuna", "seed=0,1", "hydra.sweeper.direction=[minimize,maximize]"], "one direction"),
        (["hydra/sweeper=optuna", "seed=0,1", "hydra.sweeper.n_trials=none"], "n_trials"),
        (["hydra/sweeper=optuna", "seed=0,1", "hydra.sweeper.n_trials=0"], "No trials"),
        (["hydra/sweeper=optuna", "seed=0,1", "monitor.knn_every_epochs=0"], "monitor.knn_every_epochs is 0"),
        (["hydra/sweeper=optunaa", "seed=0,1"], "'optuna'"),
        (["hydra/sweeper=null", "seed=0,1"], "hydra/sweeper needs a choice"),
        (["hydra/launcher=joblib", "hydra.launcher.n_jobs=many", "seed=0,1"], "n_jobs"),
        (["hydra/launcher=joblibb", "seed=0,1"], "'joblib'"),
        (["hydra/launcher=ray", "seed=0,1"], "pip install hydra-ray-launcher"),
        (["hydra/launcher=null", "seed=0,1"], "hydra/launcher needs a choice"),
        (["hydra/launcher=submitit_slurm", "seed=0,1"], "sbatch is not installed"),
    ],
)
def test_a_wrong_engine_is_refused_in_one_line(
    wrong: list[str], expected: str, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    ended = cli("ssl-train", *HERE, *wrong)
    assert ended.code == 2
    assert expected in ended.err
    assert ended.err.strip().count("\n") == 0
