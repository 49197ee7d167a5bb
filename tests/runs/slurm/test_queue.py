"""State and log of submitted jobs, with short scripts instead of the commands of Slurm."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from command_line import SMALL
from slurm_site import Site
from sslcli.runs.slurm import queue
from sslcli.system.stored import DamagedFile

LINE = [*SMALL, "launcher=slurm", "run_dir=run"]


def test_waiting_prints_the_log_and_ends_with_the_code_of_the_job(site: Site) -> None:
    folder = site.path / "run" / "slurm"
    site.write("sbatch", f"echo step 1 of 3 >{folder}/41.log; echo 3 >{folder}/41.exit; echo 41")
    code, out, _ = site.train(*LINE, "launcher.wait=true")
    assert code == 3
    assert out.endswith("step 1 of 3\n")


@pytest.mark.parametrize(("state", "expected"), [("CANCELLED", 75), ("TIMEOUT", 75), ("OUT_OF_MEMORY", 3)])
def test_a_job_that_ends_without_a_word_has_the_code_of_its_state(site: Site, state: str, expected: int) -> None:
    site.monkeypatch.setattr(queue, "QUERY_EVERY", 0.01)
    site.write("squeue", f"echo {state} {site.path}/run/slurm/job.sbatch")
    code, _, err = site.train(*LINE, "launcher.wait=true")
    assert code == expected
    assert f"job 41 ended in state {state}" in err


def test_without_slurm_the_message_says_what_to_do(site: Site) -> None:
    site.monkeypatch.setenv("PATH", str(site.path))
    code, out, err = site.train(*LINE)
    assert (code, out) == (2, "")
    assert err.startswith("ssl-train: launcher=slurm needs the command sbatch, which is not installed on this machine")
    assert err.count("\n") == 1


def test_a_refused_submission_is_one_line_with_slurms_reason(site: Site) -> None:
    error = "sbatch: error: invalid partition specified: fast\nsbatch: error: Batch job submission failed: Invalid"
    site.write("sbatch", f"printf '%s\\n' '{error}' >&2; exit 1")
    site.write("sinfo", "echo debug; echo long")
    code, out, err = site.train(*LINE, "launcher.partition=fast")
    assert (code, out) == (2, "")
    assert err == (
        "ssl-train: sbatch rejected the job: invalid partition specified: fast; Batch job submission failed: Invalid. "
        f"Partitions here: debug, long. The script is {site.path}/run/slurm/job.sbatch\n"
    )
    site.write("sbatch", "echo 42")
    assert site.train(*LINE)[0] == 0


def test_a_controller_that_does_not_answer_stops_a_second_submission(site: Site) -> None:
    site.train(*LINE)
    site.write("squeue", "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")
    code, _, err = site.train(*LINE)
    assert (code, site.submissions) == (2, 1)
    assert "squeue failed" in err


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


@pytest.mark.parametrize("content", [b"", b"\xff", b"41; rm", b"4 1", b"job"])
def test_a_damaged_job_id_is_refused_and_no_second_job_is_submitted(content: bytes, site: Site) -> None:
    assert site.train(*LINE)[0] == 0
    path = site.path / "run" / "slurm" / "job"
    path.write_bytes(content)
    code, _, err = site.train(*LINE)
    assert (code, err.count("\n")) == (2, 1)
    assert f"{path} is damaged (" in err
    assert "squeue" in err
    assert site.submissions == 1


@pytest.mark.parametrize(("content", "expected"), [(b"", 3), (b"0\n", 0), (b"75\n", 75)])
def test_an_exit_code_is_read(content: bytes, expected: int, tmp_path: Path) -> None:
    path = tmp_path / "41.exit"
    assert queue.read_exit_code(path) is None
    path.write_bytes(content)
    assert queue.read_exit_code(path) == expected


@pytest.mark.parametrize("content", [b"none", b"\xff", b"-1", b"3 4", b"9999"])
def test_a_damaged_exit_code_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "41.exit").write_bytes(content)
    with pytest.raises(DamagedFile, match=r"41\.exit is damaged \(.*\): remove it"):
        queue.read_exit_code(tmp_path / "41.exit")
