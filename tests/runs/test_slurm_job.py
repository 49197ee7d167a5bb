"""Submission of a run to Slurm, and its node processes, with stand-ins for the commands of Slurm."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from command_line import SMALL
from slurm_site import Site
from sslcli.errors import ConfigError
from sslcli.runs import slurm_job
from sslcli.system.stored import DamagedFile

LINE = [*SMALL, "launcher=slurm", "run_dir=run"]


def test_a_submission_returns_with_number_directory_and_how_to_follow(site: Site) -> None:
    code, out, err = site.train(*LINE, "launcher.nodes=2", "launcher.partition=long")
    assert (code, err, site.submissions) == (0, "", 1)
    assert out.splitlines() == [
        f"job 41: {site.path}/run",
        f"  follow it: tail -n +1 -F {site.path}/run/slurm/41.log",
        "  cancel it: scancel 41",
    ]
    script = (site.path / "run" / "slurm" / "job.sbatch").read_text()
    assert "#SBATCH --nodes=2\n" in script
    assert "#SBATCH --partition=long\n" in script


def test_a_dry_run_prints_the_script_and_leaves_nothing(site: Site) -> None:
    code, out, err = site.train(*LINE, "dry_run=true", "launcher.time=2h")
    assert (code, err, site.submissions) == (0, "", 0)
    assert out.startswith("#!/bin/bash\n#SBATCH --job-name=ssl-run\n")
    assert "#SBATCH --time=0-02:00:00\n" in out
    assert not (site.path / "run").exists()


def test_the_same_command_again_says_that_the_job_is_there(site: Site) -> None:
    site.train(*LINE)
    code, out, _ = site.train(*LINE)
    assert (code, site.submissions) == (0, 1)
    assert out.startswith("job 41 is RUNNING for this run already\n")


def test_initial_weights_that_are_missing_on_this_machine_are_warned_about(site: Site) -> None:
    code, _, err = site.train(*LINE, "init=absent.pt")
    assert (code, site.submissions) == (0, 1)
    assert err == (
        f"warning: init is {site.path}/absent.pt, but it does not exist on this machine: the job fails unless its "
        "nodes have it\n"
    )
    (site.path / "run" / "checkpoints").mkdir()
    (site.path / "run" / "checkpoints" / "step-000003.pt").touch()
    site.write("squeue", "echo FAILED $PWD/run/slurm/job.sbatch")
    assert site.train(*LINE, "init=absent.pt")[2] == ""  # a run with a checkpoint does not read init


@pytest.mark.parametrize(
    "answer",
    ["echo FAILED $PWD/run/slurm/job.sbatch", "echo RUNNING /another/job.sbatch", "echo Invalid job id >&2; exit 1"],
    ids=["failed", "another one's", "forgotten"],
)
def test_after_its_end_the_same_command_submits_again(site: Site, answer: str) -> None:
    site.train(*LINE)
    site.write("squeue", answer)
    code, out, _ = site.train(*LINE)
    assert (code, site.submissions) == (0, 2)
    assert out.startswith("job 41: ")
    history = (site.path / "run" / "slurm" / "history.log").read_text()
    assert history.count("job 41 submitted") == 2


def test_a_finished_run_is_not_submitted(site: Site) -> None:
    (site.path / "run").mkdir()
    (site.path / "run" / "done").touch()
    code, out, _ = site.train(*LINE)
    assert (code, out, site.submissions) == (0, f"this run is finished already: {site.path}/run\n", 0)


def test_another_configuration_is_refused_before_it_is_queued(site: Site) -> None:
    (site.path / "run").mkdir()
    (site.path / "run" / "config.yaml").write_text("method: {_target_: x}\nseed: 1\ntrain: {}\neffective: {}\n")
    code, _, err = site.train(*LINE)
    assert (code, site.submissions) == (2, 0)
    assert "seed: 1 -> 0" in err


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("launcher.nodes=0", "launcher.nodes is 0, but it must be at least 1"),
        ("launcher.nodes=two", "launcher.nodes is 'two', but it must be an integer"),
        ("launcher.time=abc", "launcher.time is 'abc'"),
        ("launcher.partitions=x", "Did you mean 'partition'?"),
        ("launcher.nodes=3", "train.batch_size is 32, but it must split evenly"),
        ("launcher.extra=--exclusive", "launcher.extra is '--exclusive', but it must be a list of strings"),
    ],
)
def test_a_wrong_key_is_refused_before_anything_is_written(site: Site, override: str, expected: str) -> None:
    code, out, err = site.train(*LINE, override)
    assert (code, out, site.submissions) == (2, "", 0)
    assert expected in err
    assert err.count("\n") == 1
    assert not (site.path / "run").exists()


def test_a_longer_run_is_submitted_to_start_after_the_active_job(site: Site) -> None:
    line = [argument for argument in LINE if not argument.startswith("train.max_steps")]
    folder = site.path / "run" / "slurm"
    assert site.train(*line, "train.max_steps=3")[0] == 0
    first = (folder / "config.json").read_bytes()
    site.write("sbatch", f'echo "$@" >>{site.path}/submitted; echo 42')
    site.write("squeue", f"echo PENDING {folder}/job.sbatch")
    code, out, err = site.train(*line, "train.max_steps=6")
    assert (code, err) == (0, "")
    assert "job 41 is PENDING with a shorter length: the next job extends the run after job 41 has ended" in out
    assert "job 42: " in out
    assert "--dependency=afterany:41" in (site.path / "submitted").read_text().splitlines()[1]
    assert (folder / "config.json").read_bytes() == first  # the first job reads it again if it is requeued
    assert slurm_job.stored_config(folder / "config-after-41.json").train.max_steps == 6
    assert "config-after-41.json" in (folder / "job.sbatch").read_text()
    assert "job 42 submitted, starts after job 41" in (folder / "history.log").read_text()
    assert "job 42 is PENDING for this run already" in site.train(*line, "train.max_steps=6")[1]
    for wrong, expected in (("train.max_steps=5", "cannot be shortened"), ("seed=1", "seed: 0 -> 1")):
        code, _, err = site.train(*line, "train.max_steps=7", wrong)
        assert (code, site.submissions) == (2, 2)
        assert expected in err
        assert "scancel 42" in err
    site.write("sbatch", "echo no >&2; exit 1")
    assert site.train(*line, "train.max_steps=9")[0] == 2
    assert "job 42 is PENDING for this run already" in site.train(*line, "train.max_steps=6")[1]


@pytest.mark.parametrize(
    "change",
    [
        lambda plain: plain.pop("train"),
        lambda plain: plain.update(train=[]),
        lambda plain: plain["train"].update(unknown=1),
        lambda plain: plain["launcher"].update(kind="other"),
        lambda plain: plain.update(_lines_="x"),
    ],
)
def test_a_damaged_configuration_of_a_job_is_refused(change: Callable[[dict[str, Any]], Any], site: Site) -> None:
    assert site.train(*LINE)[0] == 0
    path = site.path / "run" / "slurm" / "config.json"
    assert slurm_job.stored_config(path).seed == 0
    plain = json.loads(path.read_text())
    change(plain)
    path.write_text(json.dumps(plain))
    with pytest.raises(DamagedFile, match=r"config\.json is damaged \(.*\): run the same ssl-train command again"):
        slurm_job.stored_config(path)
    path.unlink()
    with pytest.raises(ConfigError, match=r"there is no .*config\.json"):
        slurm_job.stored_config(path)


@pytest.mark.parametrize("content", [b"", b"\xff", b"../config.json", b"config-after-x.json", b"\0" * 9])
def test_a_damaged_name_of_a_configuration_is_refused(content: bytes, tmp_path: Path) -> None:
    assert slurm_job.config_name(tmp_path) == "config.json"
    (tmp_path / "job_config").write_bytes(b"config-after-17_2.json\n")
    assert slurm_job.config_name(tmp_path) == "config-after-17_2.json"
    (tmp_path / "job_config").write_bytes(content)
    with pytest.raises(DamagedFile, match=r"job_config is damaged \(.*\): check with squeue"):
        slurm_job.config_name(tmp_path)
