"""Submitting and following without a cluster: the commands of Slurm are short scripts here."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest

from command_line import SMALL
from sslcli.cli import train as ssl_train
from sslcli.runs.slurm import queue

LINE = [*SMALL, "launcher=slurm", "run_dir=run"]


class Site:
    """A folder to work in, with stand-ins for the commands of Slurm first on the path."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[str]) -> None:
        self.path, self.monkeypatch, self.capture = path, monkeypatch, capture

    def write(self, name: str, text: str) -> None:
        """Put a shell script in the place of a command."""
        path = self.path / "bin" / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)

    def train(self, *arguments: str) -> tuple[int, str, str]:
        """`ssl-train ARGUMENTS` in this process: its exit code, and what it printed."""
        self.monkeypatch.setattr(sys, "argv", ["ssl-train", *arguments])
        with pytest.raises(SystemExit) as ended:
            ssl_train.main()
        out, err = self.capture.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, out, err

    @property
    def submissions(self) -> int:
        path = self.path / "submitted"
        return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Site:
    """With an sbatch that accepts, and a squeue that knows the job as running."""
    (tmp_path / "bin").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    monkeypatch.setattr(sys, "path", list(sys.path))
    site = Site(tmp_path, monkeypatch, capfd)
    site.write("sbatch", f'echo "$@" >>{tmp_path}/submitted; echo 41')
    site.write("squeue", f"echo RUNNING {tmp_path}/run/slurm/job.sbatch")
    return site


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
    (site.path / "run" / "config.yaml").write_text("method: {}\nseed: 1\n")
    code, _, err = site.train(*LINE)
    assert (code, site.submissions) == (2, 0)
    assert "seed: 1 -> 0" in err


def test_waiting_prints_the_log_and_ends_with_the_code_of_the_job(site: Site) -> None:
    folder = site.path / "run" / "slurm"
    site.write("sbatch", f"echo step 1 of 3 >{folder}/41.log; echo 3 >{folder}/41.exit; echo 41")
    code, out, _ = site.train(*LINE, "launcher.wait=true")
    assert code == 3
    assert out.endswith("step 1 of 3\n")


@pytest.mark.parametrize(("state", "expected"), [("CANCELLED", 75), ("TIMEOUT", 75), ("OUT_OF_MEMORY", 3)])
def test_a_job_that_ends_without_a_word_has_the_code_of_its_state(site: Site, state: str, expected: int) -> None:
    site.monkeypatch.setattr(queue, "ASK_EVERY", 0.01)
    site.write("squeue", f"echo {state} {site.path}/run/slurm/job.sbatch")
    code, _, err = site.train(*LINE, "launcher.wait=true")
    assert code == expected
    assert f"job 41 ended as {state}" in err


def test_without_slurm_the_message_says_what_to_do(site: Site) -> None:
    site.monkeypatch.setenv("PATH", str(site.path))
    code, out, err = site.train(*LINE)
    assert (code, out) == (2, "")
    assert err.startswith("ssl-train: launcher=slurm needs the command sbatch, which is not on this machine")
    assert err.count("\n") == 1


def test_a_refused_submission_is_one_line_with_slurms_reason(site: Site) -> None:
    error = "sbatch: error: invalid partition specified: fast\nsbatch: error: Batch job submission failed: Invalid"
    site.write("sbatch", f"printf '%s\\n' '{error}' >&2; exit 1")
    site.write("sinfo", "echo debug; echo long")
    code, out, err = site.train(*LINE, "launcher.partition=fast")
    assert (code, out) == (2, "")
    assert err == (
        "ssl-train: sbatch refused the job: invalid partition specified: fast; Batch job submission failed: Invalid. "
        f"Partitions here: debug, long. The script is {site.path}/run/slurm/job.sbatch\n"
    )
    site.write("sbatch", "echo 42")
    assert site.train(*LINE)[0] == 0


def test_a_controller_that_does_not_answer_stops_a_second_submission(site: Site) -> None:
    site.train(*LINE)
    site.write("squeue", "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")
    code, _, err = site.train(*LINE)
    assert (code, site.submissions) == (2, 1)
    assert "squeue does not answer" in err


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("launcher.nodes=0", "launcher.nodes is 0, but it must be at least 1"),
        ("launcher.nodes=two", "launcher.nodes is 'two', but it must be a whole number"),
        ("launcher.time=abc", "launcher.time is 'abc'"),
        ("launcher.partitions=x", "Did you mean 'partition'?"),
        ("launcher.nodes=3", "train.batch_size is 32, but it must split evenly"),
        ("launcher.extra=--exclusive", "launcher.extra is '--exclusive', but it must be a list of texts"),
    ],
)
def test_a_wrong_key_is_refused_before_anything_is_written(site: Site, override: str, told: str) -> None:
    code, out, err = site.train(*LINE, override)
    assert (code, out, site.submissions) == (2, "", 0)
    assert told in err
    assert err.count("\n") == 1
    assert not (site.path / "run").exists()


def test_a_sweep_submits_a_job_for_each_point_and_again_what_failed(site: Site) -> None:
    line = [*SMALL, "launcher=slurm", "--multirun", "seed=0,1"]
    site.write("sbatch", f'echo "$2" >>{site.path}/submitted; echo $$ >$(dirname "$2")/id; echo $$')
    site.write(
        "squeue",
        'echo PENDING "$(find $PWD/runs -name id -exec grep -l "^${3#--jobs=}$" {} + | xargs dirname)/job.sbatch"',
    )
    code, _, _ = site.train(*line)
    assert (code, site.submissions, table_of(site)) == (0, 2, [("submitted", "0")] * 2)

    assert site.train(*line)[0] == 0  # asks for both, which are in the queue
    assert site.submissions == 2

    first, second = sorted(site.path.glob("runs/*/*/slurm"))
    (first / f"{(first / 'id').read_text().strip()}.exit").write_text("75\n")
    (second / f"{(second / 'id').read_text().strip()}.exit").write_text("3\n")
    site.write("squeue", "echo FAILED")
    assert site.train(*line)[0] == 3
    assert site.submissions == 3
    assert table_of(site) == [("submitted", "0"), ("failed", "3")]


def test_a_sweep_that_waits_ends_with_what_became_of_its_jobs(site: Site) -> None:
    site.write(
        "sbatch",
        'folder=$(dirname "$2"); case $(cat "$folder/config.json") in *\'"seed": 1\'*) code=3 ;; *) code=0 ;; esac\n'
        f'echo "$2" >>{site.path}/submitted; echo $$\n'
        '(sleep 1; [ $code = 3 ] || touch "$folder/../done"; echo $code >"$folder/$$.exit") >/dev/null 2>&1 &',
    )
    code, _, _ = site.train(*SMALL, "launcher=slurm", "launcher.wait=true", "--multirun", "seed=0,1")
    assert (code, site.submissions, table_of(site)) == (3, 2, [("finished", "0"), ("failed", "3")])


def table_of(site: Site) -> list[tuple[str, str]]:
    """Status and exit code of the jobs of the sweep."""
    (path,) = site.path.glob("runs/*/sweep.csv")
    with path.open() as file:
        return [(row["status"], row["exit_code"]) for row in csv.DictReader(file)]
