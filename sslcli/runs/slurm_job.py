"""launcher=slurm: submit a run from the login shell, and carry it out on a node of its job."""

from __future__ import annotations

import json
import os
import sys
import time
from functools import partial
from pathlib import Path

from sslcli.config.moved import current_config
from sslcli.config.run_config import RunConfig
from sslcli.config.slurm import SlurmSettings
from sslcli.errors import EXIT_CONFIG, EXIT_INTERRUPTED, ConfigError, print_error
from sslcli.report.terminal import guard_terminal, log_and_print
from sslcli.runs import directory
from sslcli.runs.slurm import queue
from sslcli.runs.slurm.script import render
from sslcli.system import atomic, child_processes


def launch(config: RunConfig) -> int:
    """Submit a checked configuration with an absolute run_dir; the exit code. Raises ConfigError."""
    run_dir, settings = Path(str(config.run_dir)), config.launcher
    assert isinstance(settings, SlurmSettings)
    text = render(settings, folder=folder_of(run_dir), cwd=Path.cwd(), python=sys.executable)
    if config.dry_run:
        print(text, end="")
        return 0
    directory.check_resumable(run_dir, config.values)
    if directory.is_finished(run_dir) and config.resume != "never":
        print(f"this run is finished already: {run_dir}")
        return 0
    job = active_job(run_dir)
    if job is not None:
        print(f"job {job[0]} is {job[1]} for this run already", flush=True)
    else:
        with directory.lock(run_dir):
            job = active_job(run_dir)  # once more, now that nobody else submits
            job = job or (submitted(run_dir, config, text), "submitted")
    introduce(job[0], run_dir)
    return wait(job[0], run_dir) if settings.wait else 0


def folder_of(run_dir: Path) -> Path:
    """Where script, logs and history of a run's jobs are."""
    return run_dir / "slurm"


def active_job(run_dir: Path) -> tuple[str, str] | None:
    """Number and state of the job of this run that is queued or at work."""
    job = queue.submitted_job(run_dir)
    if job is None:
        return None
    state = queue.state(job, folder_of(run_dir) / "job.sbatch")
    return None if state is None or state in queue.OVER else (job, state)


def submitted(run_dir: Path, config: RunConfig, text: str) -> str:
    """Write what the job needs and hand it in; its number."""
    folder = folder_of(run_dir)
    folder.mkdir(exist_ok=True)
    atomic.replace(folder / "config.json", json.dumps(config.plain()).encode())
    atomic.replace(folder / "job.sbatch", text.encode())
    job = queue.submit(folder / "job.sbatch")
    atomic.replace(folder / "job", f"{job}\n".encode())
    with (folder / "history.log").open("a", encoding="utf-8") as history:
        history.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} job {job} submitted\n")
    return job


def introduce(job: str, run_dir: Path) -> None:
    """Print number and directory of a job, and the commands to follow and to cancel it."""
    print(f"job {job}: {run_dir}")
    print(f"  follow it: tail -n +1 -F {folder_of(run_dir) / f'{job}.log'}")
    print(f"  cancel it: scancel {job}", flush=True)


def wait(job: str, run_dir: Path) -> int:
    """Print the log of a job until it ends; its exit code."""
    try:
        return queue.follow(job, folder_of(run_dir) / "job.sbatch")
    except KeyboardInterrupt:
        print(f"\nssl-train: job {job} goes on without being watched; scancel {job} ends it", file=sys.stderr)
        return EXIT_INTERRUPTED


def carry_out(config: RunConfig, endpoint: str) -> int:
    """What each node of the job does: start its processes and return their exit code. Raises ConfigError."""
    import torch

    from sslcli.distributed.elastic import Meeting, run_processes

    settings = config.launcher
    assert isinstance(settings, SlurmSettings)
    if config.device != "cpu" and torch.cuda.device_count() < settings.gpus_per_node:
        raise ConfigError(
            f"launcher.gpus_per_node is {settings.gpus_per_node}, but torch sees {torch.cuda.device_count()} GPUs on "
            f"{os.uname().nodename}: check launcher.setup and the build of torch, or train with device=cpu"
        )
    if settings.nodes * settings.processes == 1:
        child_processes.find_trusted(config.trust)
        from sslcli.runs.worker import run

        return run(config)
    meeting = Meeting(
        name=f"{os.environ['SLURM_JOB_ID']}-{endpoint}",
        nodes=settings.nodes,
        node=int(os.environ["SLURM_NODEID"]),
        endpoint=endpoint,
    )
    run_dir = Path(str(config.run_dir))
    return run_processes(
        [*child_processes.arguments("sslcli.runs.launch"), str(folder_of(run_dir) / "config.json")],
        processes=settings.processes,
        max_restarts=0,  # of one node alone; the script starts all nodes again
        tell=partial(log_and_print, run_dir),
        meeting=meeting,
    )


def main() -> None:
    """One node of a job: `python -m sslcli.runs.slurm_job CONFIG.json HOST:PORT`."""
    guard_terminal()
    path = Path(sys.argv[1])
    try:
        plain, _ = current_config(json.loads(path.read_text(encoding="utf-8")))
        code = carry_out(RunConfig.from_plain(plain), sys.argv[2])
    except ConfigError as error:
        print_error("train", error)
        code = EXIT_CONFIG
    (path.parent / "codes" / os.environ["SLURM_NODEID"]).write_text(f"{code}\n", encoding="utf-8")
    sys.exit(code)


if __name__ == "__main__":
    main()
