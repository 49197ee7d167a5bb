"""Slurm's queue: hand a script in, ask for a job, follow it to its end."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from sslcli.errors import EXIT_FAILED, EXIT_STOPPED, ConfigError

PATIENCE = 60.0  # seconds until a command of Slurm counts as hanging
ASK_EVERY = 5.0  # seconds; the controller serves everybody
LOOK_EVERY = 0.3  # seconds between looks at the log
OVER = {  # what Slurm calls the end of a job, and our exit code where the job could not tell its own
    "BOOT_FAIL": EXIT_STOPPED,
    "CANCELLED": EXIT_STOPPED,
    "COMPLETED": 0,
    "DEADLINE": EXIT_STOPPED,
    "FAILED": EXIT_FAILED,
    "NODE_FAIL": EXIT_STOPPED,
    "OUT_OF_MEMORY": EXIT_FAILED,
    "PREEMPTED": EXIT_STOPPED,
    "REVOKED": EXIT_STOPPED,
    "TIMEOUT": EXIT_STOPPED,
}


def submit(script: Path) -> str:
    """Hand the script in; the number of the job. Raises ConfigError where Slurm refuses it."""
    ended = ask("sbatch", "--parsable", str(script))
    if ended.returncode != 0:
        hint = ""
        if "partition" in ended.stderr.lower():
            hint = f". Partitions here: {', '.join(ask('sinfo', '--noheader', '--format=%R').stdout.split()) or 'none'}"
        raise ConfigError(f"sbatch refused the job: {in_one_line(ended.stderr)}{hint}. The script is {script}")
    return ended.stdout.strip().partition(";")[0]


def state(job: str, script: Path) -> str | None:
    """The state of the job of that script, in Slurm's words; None where Slurm knows it no longer.

    Raises ConfigError where Slurm does not answer.
    """
    ended = ask("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T %o")
    if ended.returncode != 0:
        if "Invalid job id" in ended.stderr:
            return None
        raise ConfigError(f"squeue does not answer: {in_one_line(ended.stderr)}")
    found, _, command = ended.stdout.strip().partition(" ")
    return found if command == str(script) else None  # numbers come again when a cluster is set up anew


def told_job(run_dir: Path) -> str | None:
    """The number of the newest job of a run, None where there was none."""
    path = run_dir / "slurm" / "job"
    return path.read_text(encoding="utf-8").strip() if path.exists() else None


def told_code(run_dir: Path) -> int | None:
    """The exit code of the newest job of a run, None where it has not told one."""
    path = run_dir / "slurm" / f"{told_job(run_dir)}.exit"
    return int(path.read_text(encoding="utf-8") or EXIT_FAILED) if path.exists() else None


def follow(job: str, script: Path) -> int:
    """Print the log of a job until it ends; its exit code."""
    log, told = script.with_name(f"{job}.log"), script.with_name(f"{job}.exit")
    place, asked = 0, time.monotonic()
    while True:
        over = told.exists()
        place = show_from(log, place)
        if over:
            return int(told.read_text() or EXIT_FAILED)
        if time.monotonic() - asked > ASK_EVERY:
            asked = time.monotonic()
            try:
                found = state(job, script)
            except ConfigError:  # the controller may be away for a while; the job goes on
                continue
            if found is None or found in OVER:
                time.sleep(ASK_EVERY if found is None else LOOK_EVERY)  # for a last word on a shared file system
                if told.exists():
                    continue
                print(f"job {job} ended as {found or 'unknown'}, without a word of its own", file=sys.stderr)
                return OVER[found] if found else EXIT_FAILED
        time.sleep(LOOK_EVERY)


def show_from(log: Path, place: int) -> int:
    """Print what the log holds after `place`; the new place."""
    if not log.exists():
        return place
    with log.open("rb") as file:
        file.seek(place)
        sys.stdout.write(file.read().decode(errors="replace"))
        sys.stdout.flush()
        return file.tell()


def ask(*line: str) -> subprocess.CompletedProcess[str]:
    """Run a command of Slurm. Raises ConfigError where there is none, or it hangs."""
    try:
        return subprocess.run(line, capture_output=True, text=True, timeout=PATIENCE, check=False)
    except FileNotFoundError as error:
        raise ConfigError(
            f"launcher=slurm needs the command {line[0]}, which is not on this machine: start it on a login node of "
            "a Slurm cluster, or use launcher=multi"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"{line[0]} gave no answer within {PATIENCE:g} s: try again later") from error


def in_one_line(text: str) -> str:
    """The lines of an error message as one, without the command's name before each."""
    lines = [line.partition(": error: ")[2] or line for line in text.strip().splitlines() if line.strip()]
    return "; ".join(line.strip().rstrip(".") for line in lines) or "no reason given"
