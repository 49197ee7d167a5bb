"""A sweep finds the jobs that other sweeps run or have run, and does not run them again."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from command_line import Cli
from small_sweeps import column, start_sweep, table, wait_until, write_configs
from sslcli.sweeps import queue
from sslcli.sweeps.job import Job, Sweep

LINE = ["device=cpu", "-m"]


@pytest.fixture(autouse=True)
def _quick(quick_jobs: None, cli: Cli, tmp_path: Path) -> None:
    """Jobs write the configuration that they have, and do not train."""
    write_configs(tmp_path, range(8))


def folder_of(tmp_path: Path, *others: Path) -> Path:
    """The folder of the sweep that is not in `others`."""
    (found,) = set((tmp_path / "runs").glob("sweep_*")) - set(others)
    return found


def starts(folder: Path) -> dict[str, int]:
    """How often each job was started, by seed."""
    places = column(folder, "run_dir").items()
    return {seed: len((folder / place / "starts").read_text().splitlines()) for seed, place in places}


def test_a_sweep_to_which_values_are_added_runs_only_the_new_jobs(cli: Cli, tmp_path: Path) -> None:
    assert cli("ssl-train", *LINE, "seed=0,1").code == 0
    first = folder_of(tmp_path)
    ended = cli("ssl-train", *LINE, "seed=0,1,2")
    assert ended.code == 0
    second = folder_of(tmp_path, first)
    assert "3 jobs in" in ended.out
    assert f"2 finished; 1 to run\n2 of these jobs from {first}\n" in ended.out
    assert starts(second) == {"0": 1, "1": 1, "2": 1}
    assert column(second, "status") == dict.fromkeys("012", "finished")
    assert column(second, "steps") == dict.fromkeys("012", "3")
    assert [row["seed"] for row in table(second)] == ["2", "1", "0"]
    places = [second / place for place in column(second, "run_dir").values()]
    links = [path for path in places if path.is_symlink()]
    assert {os.readlink(path) for path in links} == {f"../{first.name}/{path.name}" for path in links}
    assert len(links) == 2
    # The folder that contains all sweeps can be moved, and the next sweep refers to the sweep that ran the job.
    (tmp_path / "runs").rename(tmp_path / "moved")
    (tmp_path / "moved").rename(tmp_path / "runs")
    assert cli("ssl-train", *LINE, "seed=0,1,2").out.count("3 finished; 0 to run") == 1
    assert "1 of these jobs from" in cli("ssl-train", *LINE, "seed=0,2,3").out
    third = folder_of(tmp_path, first, second)
    assert starts(third) == {"0": 1, "2": 1, "3": 1}
    assert all(".." not in str(path.resolve().relative_to(tmp_path)) for path in third.iterdir())


def test_jobs_are_recognized_by_their_settings_and_not_by_their_overrides(cli: Cli, tmp_path: Path) -> None:
    assert cli("ssl-train", *LINE, "seed=0,1").code == 0
    first = folder_of(tmp_path)
    ended = cli("ssl-train", *LINE, "seed=0,1", "method=simclr", "dataset.workers=0", "optimizer.lr=0.030")
    assert ended.code == 0
    assert "2 finished; 0 to run" in ended.out
    assert starts(folder_of(tmp_path, first)) == {"0": 1, "1": 1}


def test_a_folder_that_was_chosen_uses_only_its_own_jobs(cli: Cli, tmp_path: Path) -> None:
    assert cli("ssl-train", *LINE, "seed=0,1").code == 0
    ended = cli("ssl-train", *LINE, "seed=0,1,2", "hydra.sweep.dir=runs/sweep_mine")
    assert "3 jobs in" in ended.out
    assert "; 3 to run" in ended.out
    assert not any(path.is_symlink() for path in (tmp_path / "runs/sweep_mine").iterdir())


def test_a_run_with_other_settings_than_its_record_is_not_used(cli: Cli, tmp_path: Path) -> None:
    write_configs(tmp_path, range(1), "optimizer.lr=0.5")
    assert cli("ssl-train", *LINE, "seed=0,1").code == 0
    first = folder_of(tmp_path)
    next(path for path in first.glob("jobs/*.json") if "seed=1" in path.read_text()).write_text("{")
    ended = cli("ssl-train", *LINE, "seed=0,1,2")
    assert ended.code == 0
    assert "; 3 to run" in ended.out


def test_records_without_a_digest_are_recognized_by_the_run(cli: Cli, tmp_path: Path) -> None:
    assert cli("ssl-train", *LINE, "seed=0,1").code == 0
    for path in folder_of(tmp_path).glob("jobs/*.json"):
        kept = {key: value for key, value in json.loads(path.read_text()).items() if value or key == "code"}
        del kept["digest"], kept["epochs"], kept["extend"]
        path.write_text(json.dumps(kept))
    assert "2 finished; 1 to run" in cli("ssl-train", *LINE, "seed=0,1,2").out


def test_a_deleted_sweep_is_run_again(cli: Cli, tmp_path: Path) -> None:
    assert cli("ssl-train", *LINE, "seed=0,1").code == 0
    first = folder_of(tmp_path)
    assert cli("ssl-train", *LINE, "seed=0,1,2").code == 0
    second = folder_of(tmp_path, first)
    shutil.rmtree(first)
    ended = cli("ssl-train", *LINE, "seed=0,1,2")
    assert "1 finished; 2 to run" in ended.out
    assert column(second, "status") == dict.fromkeys("012", "finished")
    assert not any(path.is_symlink() for path in second.iterdir())


def test_a_deleted_run_is_run_again_where_it_was(cli: Cli, tmp_path: Path) -> None:
    assert cli("ssl-train", *LINE, "seed=0,1").code == 0
    first = folder_of(tmp_path)
    assert cli("ssl-train", *LINE, "seed=0,1,2").code == 0
    shutil.rmtree(first / column(first, "run_dir")["0"])
    assert cli("ssl-train", *LINE, "seed=0,1,2").code == 0
    assert cli("ssl-train", *LINE, "seed=0,1").out.count("2 finished; 0 to run") == 1


def test_interrupted_jobs_continue_and_failed_jobs_stay_failed(cli: Cli, tmp_path: Path) -> None:
    assert cli("ssl-train", *LINE, "seed=3,4").code == 3
    first = folder_of(tmp_path)
    ended = cli("ssl-train", *LINE, "seed=3,4,0")
    assert ended.code == 3
    assert "1 failed, 1 interrupted; 2 to run" in ended.out
    second = folder_of(tmp_path, first)
    assert starts(second) == {"3": 1, "4": 2, "0": 1}
    assert column(second, "exit_code") == {"3": "3", "4": "0", "0": "0"}
    assert cli("ssl-train", *LINE, "seed=3,4,0", "sweep.retry_failed=true").code == 0
    assert cli("ssl-train", *LINE, "seed=3,4").code == 0
    assert column(first, "exit_code") == {"3": "0", "4": "0"}


def test_a_link_that_a_killed_sweep_did_not_create_is_created(cli: Cli, tmp_path: Path) -> None:
    assert cli("ssl-train", *LINE, "seed=0,4").code == 3
    first = folder_of(tmp_path)
    assert cli("ssl-train", *LINE, "seed=0,1,4", "dry_run=true").code == 0
    second = folder_of(tmp_path, first)
    for path in second.iterdir():
        if path.is_symlink():
            path.unlink()
    assert cli("ssl-train", *LINE, "seed=0,1,4").code == 0
    assert len([path for path in second.iterdir() if path.is_symlink()]) == 2
    assert cli("ssl-train", *LINE, "seed=0,4").code == 0


def test_a_job_that_another_sweep_runs_is_waited_for_and_taken_over(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = start_sweep(*LINE, "seed=5,0", "sweep.jobs=1", cwd=tmp_path)
    wait_until(lambda: len(list(tmp_path.glob("runs/sweep_*/*/checkpoints/*"))) == 1, "the job is at work")
    first = folder_of(tmp_path)
    describe = queue.describe_runner

    def describe_runner(sweep: Sweep, job: Job) -> str:
        other.send_signal(signal.SIGKILL)
        other.wait()
        record = next(path for path in first.glob("jobs/*.json") if "seed=5" in path.read_text())
        os.kill(json.loads(record.read_text())["process"], signal.SIGTERM)
        return describe(sweep, job)

    monkeypatch.setattr(queue, "describe_runner", describe_runner)
    ended = cli("ssl-train", *LINE, "seed=5,1", "sweep.jobs=1")
    assert ended.code == 0
    assert "1 running; 1 to run, 1 to wait for" in ended.out
    assert "waiting     seed=5" in ended.out
    assert starts(folder_of(tmp_path, first)) == {"5": 2, "1": 1}
    assert "1 finished; 1 to run" in cli("ssl-train", *LINE, "seed=5,0", "sweep.jobs=1").out


def test_a_sweep_that_is_killed_while_it_runs_a_job_of_another_can_be_repeated(cli: Cli, tmp_path: Path) -> None:
    assert cli("ssl-train", *LINE, "seed=4,0").code == 3
    first = folder_of(tmp_path)
    shutil.copy(tmp_path / "configs/4.yaml", tmp_path / "configs/7.yaml")
    (place,) = (first / place for seed, place in column(first, "run_dir").items() if seed == "4")
    (place / "done").unlink(missing_ok=True)
    lock = (place / ".lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)  # as the process of a job that still saves
    second = start_sweep(*LINE, "seed=4,0,1", "sweep.jobs=1", cwd=tmp_path)
    wait_until(lambda: len(list(tmp_path.glob("runs/sweep_*/*/done"))) == 2, "the other job is finished")
    second.kill()
    second.wait()
    lock.close()
    assert cli("ssl-train", *LINE, "seed=4,0,1").code == 0
    assert starts(folder_of(tmp_path, first)) == {"4": 2, "0": 1, "1": 1}


def test_a_waiting_job_that_another_sweep_has_run_meanwhile_is_not_run_again(cli: Cli, tmp_path: Path) -> None:
    first_sweep = start_sweep(*LINE, "seed=7,0", "sweep.jobs=1", cwd=tmp_path)
    wait_until(lambda: len(list(tmp_path.glob("runs/sweep_*/*/starts"))) == 1, "the first job is at work")
    first = folder_of(tmp_path)
    assert cli("ssl-train", *LINE, "seed=0,1").code == 0
    (first / "go").touch()
    assert first_sweep.wait(60) == 0
    assert column(first, "status") == {"7": "finished", "0": "finished"}
    assert starts(first) == {"7": 1, "0": 1}
    assert (first / column(first, "run_dir")["0"]).is_symlink()


def test_sweeps_that_start_together_run_a_common_job_once(cli: Cli, tmp_path: Path) -> None:
    sweeps = [start_sweep(*LINE, f"seed=0,1,2,{last}", "sweep.jobs=2", cwd=tmp_path) for last in (3, 6)]
    assert [sweep.wait(120) for sweep in sweeps] == [3, 2]
    one, other = (tmp_path / "runs").glob("sweep_*")
    for folder in (one, other):
        assert {seed: count for seed, count in starts(folder).items() if seed in "012"} == {"0": 1, "1": 1, "2": 1}
        assert {status for seed, status in column(folder, "status").items() if seed in "012"} == {"finished"}


def test_a_launcher_plugin_runs_only_the_new_jobs(cli: Cli, tmp_path: Path) -> None:
    assert cli("ssl-train", *LINE, "hydra/launcher=joblib", "seed=0,1").code == 0
    first = folder_of(tmp_path)
    assert cli("ssl-train", *LINE, "hydra/launcher=joblib", "seed=0,1,2").code == 0
    assert starts(folder_of(tmp_path, first)) == {"0": 1, "1": 1, "2": 1}


def test_a_sweeper_plugin_gets_the_results_of_reused_jobs(cli: Cli, tmp_path: Path) -> None:
    assert cli("ssl-train", *LINE, "seed=0,1").code == 0
    first = folder_of(tmp_path)
    assert cli("ssl-train", *LINE, "hydra/sweeper=optuna", "hydra.sweeper.n_trials=8", "seed=choice(0,1,2)").code == 0
    second = folder_of(tmp_path, first)
    assert set(starts(second)) >= {"1", "2"}
    assert set(starts(second).values()) == {1}
    assert {path.is_symlink() for path in second.glob("simclr*")} == {True, False}
    assert "best_value: 0.2" in (second / "optimization_results.yaml").read_text()


def test_identical_jobs_of_one_command_run_once(cli: Cli, tmp_path: Path) -> None:
    ended = cli("ssl-train", *LINE, "views=mocov2,moco_v2,byol", "seed=1,1", "hydra.sweep.dir=here")
    assert ended.code == 0
    assert "6 combinations of values, but 2 different jobs: identical jobs run once" in ended.out
    assert len(table(tmp_path / "here")) == 2
    ended = cli("ssl-train", *LINE, "optimizer.lr=0.3,0.30", "hydra.sweep.dir=rates")
    assert len(table(tmp_path / "rates")) == 1
    ended = cli("ssl-train", *LINE, "seed=1,1", "run_dir=mine", "hydra.sweep.dir=there")
    assert (ended.code, len(table(tmp_path / "there"))) == (0, 1)
