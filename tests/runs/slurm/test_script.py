"""The batch script: its directives, and its handling of signals, restarts and requeues."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from sslcli.runs.slurm.script import SlurmSettings, render
from sslcli.runs.slurm_job import command_of

CONF = Path(__file__).parents[3] / "conf" / "launcher" / "slurm.yaml"
DEFAULTS = SlurmSettings(**yaml.safe_load(CONF.read_text()))


def directives(settings: SlurmSettings, folder: Path = Path("/data/run 1/slurm")) -> list[str]:
    text = render(
        settings,
        command_of(folder.parent),
        folder=folder,
        config=folder / "config.json",
        cwd=Path("/home/me"),
        python="/opt/python",
    )
    return [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]


def test_the_directives_of_the_defaults_leave_the_rest_to_the_cluster() -> None:
    assert directives(DEFAULTS) == [
        "--job-name='ssl-run 1'",
        "--chdir=/home/me",
        "--output='/data/run 1/slurm/%j.log'",
        "--open-mode=append",
        "--nodes=1",
        "--ntasks-per-node=1",
        "--signal=B:USR1@120",
        "--requeue",
    ]


def test_every_key_becomes_a_directive() -> None:
    settings = replace(
        DEFAULTS,
        nodes=4,
        gpus_per_node=8,
        gpu_type="a100",
        cpus_per_node=64,
        memory="500G",
        partition="long",
        account="vision",
        qos="high",
        time="1.5d",
        stop_before="5m",
        constraint="nvlink&ib",
        extra=["--exclusive", "--mail-type=FAIL"],
    )
    assert set(directives(settings)) >= {
        "--nodes=4",
        "--gpus-per-node=a100:8",
        "--cpus-per-task=64",
        "--mem=500G",
        "--partition=long",
        "--account=vision",
        "--qos=high",
        "--time=1-12:00:00",
        "--signal=B:USR1@300",
        "--constraint='nvlink&ib'",
    }
    assert directives(settings)[-2:] == ["--exclusive", "--mail-type=FAIL"]
    text = render(
        settings,
        command_of(Path("/")),
        folder=Path("/f"),
        config=Path("/f/config.json"),
        cwd=Path("/"),
        python="/opt/python",
    )
    assert "step=(srun --nodes=4 --ntasks=4 --ntasks-per-node=1 --wait=60 --cpus-per-task=64)" in text


def test_a_percent_sign_in_the_folder_is_no_pattern_of_slurm() -> None:
    assert "--output=/data/50%%/slurm/%j.log" in directives(DEFAULTS, Path("/data/50%/slurm"))


# A stand-in for the commands of Slurm that a job uses. `srun` is what the run does.
SLURM = """
scontrol() {
  case "$1 $2" in
    "show hostnames") printf 'node1\\nnode2\\n' ;;
    requeue*) echo "requeue $2" >>calls ;;
    "show job") echo "JobState=$STATE Reason=${REASON:-None} PreemptTime=${PREEMPTED:-None} EndTime=2020-01-01T00:00" ;;
  esac
}
scancel() { echo "scancel $*" >>calls; touch asked; }
srun() { while [ "$1" != agent ]; do shift; done; echo "$*" >>calls; eval "$RUN"; }
sleep() { command sleep 0.05; }
export -f scontrol scancel srun
"""


def run_node(
    folder: Path, run: str, *, state: str = "RUNNING", setup: str = ":", **more: str
) -> tuple[int, list[str], list[str]]:
    """Exit code of the script, the calls it made, and its history, where `run` is what happens on the nodes."""
    text = render(
        replace(DEFAULTS, setup=setup),
        command_of(folder.parent),
        folder=folder,
        config=folder / "config.json",
        cwd=folder,
        python="/opt/python",
    )
    head, _, body = text.partition("\n# Written by")
    script = folder / "job.sbatch"
    script.write_text(f"{head}{SLURM}{body}")
    variables = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "STATE": state, "RUN": run, **more}
    ended = subprocess.run(["bash", script], cwd=folder, env=os.environ | variables, capture_output=True, timeout=20)
    calls = folder / "calls"
    history = [line.partition(": ")[2] for line in (folder / "history.log").read_text().splitlines()]
    return ended.returncode, calls.read_text().splitlines() if calls.exists() else [], history


def test_a_run_that_ends_ends_the_job_with_its_code(tmp_path: Path) -> None:
    code, calls, history = run_node(tmp_path, "true")
    assert (code, (tmp_path / "7.exit").read_text()) == (0, "0\n")
    assert calls == [f"agent /opt/python -P -m sslcli.runs.slurm_job {tmp_path}/config.json node1:{10000 + 7}"]
    assert history == ["starts on node[1-2]", "ended with exit code 0"]


def test_the_port_is_another_one_for_every_start(tmp_path: Path) -> None:
    _, calls, _ = run_node(tmp_path, "true", SLURM_RESTART_COUNT="2")
    assert calls[0].endswith(f":{10000 + 7 + 2 * 7919}")


def test_a_wrong_configuration_of_one_node_is_the_code_although_others_lost_contact(tmp_path: Path) -> None:
    code, _, _ = run_node(tmp_path, "echo 3 >codes/1; echo 2 >codes/0; exit 3")
    assert (code, (tmp_path / "7.exit").read_text()) == (2, "2\n")


def test_a_warned_run_is_asked_until_it_answers_and_queued_again(tmp_path: Path) -> None:
    deaf_to_two = "for _ in 1 2 3; do until [ -e asked ]; do :; done; rm asked; done"
    run = f"kill -USR1 $$; {deaf_to_two}; echo stopped after step 9 >want_requeue; exit 75"
    code, calls, history = run_node(tmp_path, run, PREEMPTED="2020-01-01T00:00:00")
    assert code == 0
    assert calls[1:-1] == ["scancel --signal=USR1 7"] * (len(calls) - 2)
    assert len(calls) >= 5
    assert calls[-1] == "requeue 7"
    assert history[1:] == [
        "asked to stop by preemption",
        "stopped after step 9 (preemption); requeued (1 times so far)",
    ]
    assert not (tmp_path / "7.exit").exists()
    assert not (tmp_path / "want_requeue").exists()


def test_a_cancelled_job_is_not_queued_again(tmp_path: Path) -> None:
    code, calls, _ = run_node(tmp_path, "echo stopped >want_requeue; exit 75", state="CANCELLED")
    assert (code, (tmp_path / "7.exit").read_text()) == (75, "75\n")
    assert "requeue 7" not in calls


def test_a_run_stopped_by_its_own_time_limit_is_not_queued_again(tmp_path: Path) -> None:
    code, calls, _ = run_node(tmp_path, "exit 75")
    assert (code, len(calls)) == (75, 1)


def test_a_job_that_is_warned_before_it_began_is_queued_again(tmp_path: Path) -> None:
    code, calls, history = run_node(tmp_path, "true", setup="kill -USR1 $$", PREEMPTED="2020-01-01T00:00:00")
    assert (code, calls) == (0, ["requeue 7"])
    assert history[-1] == "stopped by preemption before it started; requeued (1 times so far)"


def test_a_start_after_an_end_without_a_word_says_so(tmp_path: Path) -> None:
    (tmp_path / "history.log").write_text("t job 7 attempt 0: starts on node[1-2]\n")
    _, _, history = run_node(tmp_path, "true", SLURM_RESTART_COUNT="1")
    assert history[1].startswith("the previous attempt recorded no end")


def test_a_set_up_that_fails_ends_the_job(tmp_path: Path) -> None:
    code, calls, history = run_node(tmp_path, "true", setup="module load cuda/99")
    assert (code, calls) == (2, [])
    assert history[1] == "launcher.setup ended with exit code 127"


def test_three_attempts_that_saved_nothing_are_enough(tmp_path: Path) -> None:
    (tmp_path / "slurm").mkdir()
    folder, output = tmp_path / "slurm", []
    for attempt in range(3):
        output.append(run_node(folder, "kill -USR1 $$; sleep; exit 138", SLURM_RESTART_COUNT=str(attempt)))
    assert [code for code, _, _ in output] == [0, 0, 75]
    assert output[2][1].count("requeue 7") == 2
    assert "3 consecutive attempts saved no checkpoint" in output[2][2][-2]


@pytest.mark.parametrize(
    ("save", "codes"),
    [
        ("touch ../checkpoints/step-0000000$SLURM_RESTART_COUNT.pt", [0, 0, 0, 0]),
        ("mkdir ../checkpoints/step-0000000$SLURM_RESTART_COUNT", [0, 0, 0, 0]),
        ("mkdir ../checkpoints/step-0000000$SLURM_RESTART_COUNT.tmp", [0, 0, 75, 75]),
    ],
    ids=["files", "folders", "half written"],
)
def test_attempts_that_saved_do_not_count(save: str, codes: list[int], tmp_path: Path) -> None:
    (tmp_path / "slurm").mkdir()
    (tmp_path / "checkpoints").mkdir()
    run = f"kill -USR1 $$; sleep; {save}; exit 138"
    found = [run_node(tmp_path / "slurm", run, SLURM_RESTART_COUNT=str(attempt))[0] for attempt in range(4)]
    assert found == codes


def test_another_python_keeps_the_current_directory_out_whatever_its_version(tmp_path: Path) -> None:
    (tmp_path / "runpy.py").write_text("open('ran', 'w')")
    text = render(
        replace(DEFAULTS, python="python3"),
        command_of(tmp_path.parent),
        folder=tmp_path,
        config=tmp_path / "config.json",
        cwd=tmp_path,
        python="/opt/python",
    )
    (line,) = [line for line in text.splitlines() if line.startswith("agent=")]
    assert line.startswith("agent=(python3 -c ")
    subprocess.run(["bash", "-c", f'{line}; "${{agent[@]}}"'], cwd=tmp_path, capture_output=True, timeout=60)
    assert not (tmp_path / "ran").exists()


def test_a_time_limit_that_comes_before_the_run_is_saved_queues_again(tmp_path: Path) -> None:
    run = "kill -TERM $$; command sleep 0.5; exit 75"
    code, calls, history = run_node(tmp_path, run, state="TIMEOUT", REASON="TimeLimit")
    assert (code, calls[1:]) == (0, ["requeue 7"])
    assert history[1] == "terminated by Slurm: the job is TIMEOUT, reason TimeLimit"
    assert history[-1].startswith("the time limit was reached before the run was saved; requeued")


def test_a_crash_starts_all_again_so_many_times(tmp_path: Path) -> None:
    run = 'echo 4 >codes/0; echo "$SSLCLI_RESTARTS" >>starts; exit 4'
    code, calls, history = run_node(tmp_path, run, SLURM_RESTART_COUNT="1")
    assert (code, (tmp_path / "7.exit").read_text()) == (3, "3\n")
    assert (tmp_path / "starts").read_text().split() == ["1", "2", "3", "4"]
    assert len({call.rpartition(":")[2] for call in calls}) == 4  # ports
    assert history[-2].endswith("all restart from the last checkpoint (restart 3 of 3)")


def test_a_crash_that_does_not_come_again_is_forgotten(tmp_path: Path) -> None:
    code, calls, _ = run_node(tmp_path, "if [ -e once ]; then exit 0; fi; touch once; exit 137")
    assert (code, len(calls)) == (0, 2)


@pytest.mark.parametrize("code", [2, 3])
def test_what_would_only_happen_again_is_not_repeated(code: int, tmp_path: Path) -> None:
    ended, calls, _ = run_node(tmp_path, f"exit {code}")
    assert (ended, len(calls)) == (code, 1)
