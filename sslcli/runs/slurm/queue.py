"""Slurm's queue: submit a script, query the state of a job, and follow the log of a job."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from sslcli.errors import EXIT_FAILED, EXIT_STOPPED, ConfigError
from sslcli.report.terminal import print_text
from sslcli.system.stored import read_line

PATIENCE = 60.0  # timeout of a Slurm command in seconds
QUERY_EVERY = 5.0  # seconds between queries, to limit the load on the shared controller
READ_EVERY = 0.3  # seconds between reads of the log
JOB_ID = r"[0-9]+([_+][0-9]+)?"  # a job, a task of an array, or a component of a heterogeneous job
CHECK_JOBS = "check with squeue that no such job is active, then remove it"  # remedy for damaged files
FINAL_STATES = {  # final state of a job -> exit code to return if the job recorded none
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


def submit(script: Path, *, after: str | None = None) -> str:
    """Submit the script and return the job ID. Raise ConfigError if Slurm rejects the script.

    If `after` is the ID of a job, the new job starts after that job has ended.
    """
    order = [] if after is None else [f"--dependency=afterany:{after}"]
    ended = run_command("sbatch", "--parsable", *order, str(script))
    if ended.returncode != 0:
        hint = ""
        if "partition" in ended.stderr.lower():
            partitions = run_command("sinfo", "--noheader", "--format=%R").stdout.split()
            hint = f". Partitions here: {', '.join(partitions) or 'none'}"
        raise ConfigError(f"sbatch rejected the job: {in_one_line(ended.stderr)}{hint}. The script is {script}")
    return ended.stdout.strip().partition(";")[0]


def state(job: str, script: Path) -> str | None:
    """Return the Slurm state of a job, or None if Slurm no longer knows the job.

    Also return None if the job with this ID runs a script other than `script`, because Slurm reuses job IDs. Raises
    ConfigError if squeue fails.
    """
    ended = run_command("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T %o")
    if ended.returncode != 0:
        if "Invalid job id" in ended.stderr:
            return None
        raise ConfigError(f"squeue failed: {in_one_line(ended.stderr)}")
    job_state, _, command = ended.stdout.strip().partition(" ")
    return job_state if command == str(script) else None  # a reinstalled cluster reuses job IDs


def slurm_dir(run_dir: Path) -> Path:
    """Return the folder for the script, the logs and the history of a run's jobs."""
    return run_dir / "slurm"


def submitted_job(folder: Path) -> str | None:
    """Return the ID of the newest job of a folder, or None if no job was submitted.

    Raises DamagedFile if the file with the ID is damaged.
    """
    return read_line(folder / "job", JOB_ID, what="the ID of a job", remedy=CHECK_JOBS)


def recorded_exit_code(folder: Path) -> int | None:
    """Return the exit code that the newest job of a folder recorded, or None if the job recorded none.

    Raises DamagedFile if the file with the exit code is damaged.
    """
    return read_exit_code(folder / f"{submitted_job(folder)}.exit")


def read_exit_code(path: Path) -> int | None:
    """Return the exit code that a job wrote to the file `path`, or None if there is no such file.

    If the file is empty, the job failed, and the result is the exit code of a failed run. Raises DamagedFile if the
    file is damaged.
    """
    remedy = "remove it, and run the same command again to resume"
    text = read_line(path, r"[0-9]{0,3}", what="an exit code", remedy=remedy)
    return None if text is None else int(text or EXIT_FAILED)


def follow(job: str, script: Path) -> int:
    """Print the log of a job until the job ends, and return its exit code.

    `script` is the path of the batch script. The log and the file with the exit code are in the same folder.
    """
    log, exit_file = script.with_name(f"{job}.log"), script.with_name(f"{job}.exit")
    offset, last_query = 0, time.monotonic()
    while True:
        code = read_exit_code(exit_file)
        offset = show_from(log, offset)
        if code is not None:
            return code
        if time.monotonic() - last_query > QUERY_EVERY:
            last_query = time.monotonic()
            try:
                job_state = state(job, script)
            except ConfigError:  # the Slurm controller may be down for a while; the job continues
                continue
            if job_state is None or job_state in FINAL_STATES:
                time.sleep(
                    QUERY_EVERY if job_state is None else READ_EVERY
                )  # wait: the shared file system may delay the exit code
                if exit_file.exists():
                    continue
                print_text(
                    f"job {job} ended in state {job_state or 'unknown'} without recording an exit code", to_stderr=True
                )
                return FINAL_STATES[job_state] if job_state else EXIT_FAILED
        time.sleep(READ_EVERY)


def show_from(log: Path, offset: int) -> int:
    """Print the log from byte `offset`, and return the new offset."""
    if not log.exists():
        return offset
    with log.open("rb") as file:
        file.seek(offset)
        sys.stdout.write(file.read().decode(errors="replace"))
        sys.stdout.flush()
        return file.tell()


def run_command(*line: str) -> subprocess.CompletedProcess[str]:
    """Run a Slurm command. Raise ConfigError if the command is not installed or times out."""
    try:
        return subprocess.run(line, capture_output=True, text=True, timeout=PATIENCE, check=False)
    except FileNotFoundError as error:
        raise ConfigError(
            f"launcher=slurm needs the command {line[0]}, which is not installed on this machine: run this "
            "command on a login node of a Slurm cluster, or use launcher=multi"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"{line[0]} did not respond within {PATIENCE:g} s: try again later") from error


def in_one_line(text: str) -> str:
    """Join the lines of an error message. Remove the name of the command from the beginning of each line."""
    lines = [line.partition(": error: ")[2] or line for line in text.strip().splitlines() if line.strip()]
    return "; ".join(line.strip().rstrip(".") for line in lines) or "no reason given"
