"""Reuse of jobs: if another sweep runs or has run a job, the job is not run again.

The default folder of a sweep is named after its overrides, so a sweep with additional values has another folder. If a
job is found in another sweep, the new folder gets a symbolic link to the run directory of that job. The record of the
new job (a JSON file) refers to the record in the other sweep. Both sweeps then use the same run, the same record and
the same lock.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from sslcli.errors import ConfigError
from sslcli.runs.length import newest_step
from sslcli.runs.slurm.queue import slurm_dir, submitted_job
from sslcli.sweeps.job import Job, Record, Sweep, read, read_or_create_record, record_path, source_of, write
from sslcli.sweeps.status import FINISHED, RUNNING, claim_job, status_of, stored_digest
from sslcli.system.locks import can_lock, locked

FOLDERS = "sweep_*"  # default folders of sweeps
LOCK = ".sweeps.lock"  # in the parent folder of the sweeps; held while a sweep searches for a job in other sweeps


@dataclass(frozen=True)
class OtherJob:
    """Job of another sweep in the same parent folder."""

    sweep: Sweep
    path: Path  # path of the record
    record: Record
    run_dir: Path


def claim(sweep: Sweep, job: Job) -> IO[str] | None:
    """Lock a job, so that no other process runs it. Return the lock file, or None if another process runs the job.

    After this process has locked the job, it searches other sweeps for a started job with the same settings. A locked
    job counts as started. Therefore, if two sweeps lock the same job at the same time, one of them finds the job of the
    other. If a job is found, its run is reused (see `reuse`), and this function locks the found job instead.
    """
    file = claim_job(sweep, job)
    if file is not None and reuse(sweep, [job]):
        file.close()
        return claim_job(sweep, job)
    return file


def reuse(sweep: Sweep, jobs: Iterable[Job]) -> list[Job]:
    """Link jobs that have not started yet to jobs of other sweeps with the same settings. Return the linked jobs.

    A job stays unlinked if no other sweep has a job with the same settings. A link consists of two parts: a symbolic
    link to the run directory of the other job, and a reference to the record (JSON file) of the other job. If the run
    of a linked job was deleted, the link is removed, so that the job starts again.

    The result contains only the jobs that this call has linked.
    """
    jobs = list(jobs)
    if not sweep.reuses or not can_lock(sweep.records):
        return []
    if not any(_other_folders(sweep)) and not any(job.run_dir and job.run_dir.is_symlink() for job in jobs):
        return []
    with locked(sweep.folder.parent / LOCK):
        open_jobs = [job for job in jobs if job.digest is not None and not _is_placed(sweep, job)]
        others = _other_jobs(sweep) if open_jobs else []
        return [job for job in open_jobs if _link_to_best(sweep, job, others)]


def reused_folders(sweep: Sweep, jobs: Iterable[Job]) -> list[Path]:
    """Return the folders of the sweeps from which `jobs` of `sweep` are reused.

    The list has one folder for each reused job. A sweep from which several jobs are reused occurs several times.
    """
    sources = (source_of(sweep, read(record_path(sweep, job.name))) for job in jobs)
    return [source.resolve().parent.parent for source in sources if source is not None]


def _other_folders(sweep: Sweep) -> Iterable[Path]:
    own = sweep.folder.resolve()
    return (path for path in sorted(sweep.folder.parent.glob(FOLDERS)) if path.resolve() != own)


def _other_jobs(sweep: Sweep) -> list[OtherJob]:
    """Return the jobs of other sweeps in the same parent folder.

    A job is omitted if its record cannot be read, if it reuses the run of another sweep, or if its run directory is not
    directly in the folder of its sweep.
    """
    found = []
    for folder in _other_folders(sweep):
        for path in sorted((folder / "jobs").glob("*.json")):
            with suppress(ConfigError, OSError):
                record = read(path)
                run_dir = folder / (record.run_dir or "")
                if (
                    record.run_dir is not None
                    and record.source is None
                    and run_dir.resolve().parent == folder.resolve()
                ):
                    found.append(OtherJob(replace(sweep, folder=folder), path, record, run_dir))
    return found


def _is_placed(sweep: Sweep, job: Job) -> bool:
    """Repair the link of a job to another sweep. Return True if the job needs no new link.

    - If the run directory of the job is not directly in the sweep's folder, the result is True. Only a run directory
      directly in this folder may be a symbolic link to a run of another sweep.
    - If the record of the job already refers to another sweep, a missing symbolic link is restored, and the result is
      True.
    - If the other sweep was deleted, the symbolic link and the reference to it are removed. The run directory of the
      job then no longer exists, so the result is False.
    - If the job has no link, the result is True if its run directory exists.
    """
    run_dir = job.run_dir
    if run_dir is None or run_dir.parent != sweep.folder:
        return True
    record = read_or_create_record(sweep, job)
    source = source_of(sweep, record)
    if source is not None:
        target = source.parent.parent / (read(source).run_dir or "")
        target.mkdir(exist_ok=True)
        if not os.path.lexists(run_dir):
            _link(run_dir, target)
        return True
    if run_dir.is_symlink() and not run_dir.exists():
        run_dir.unlink()
    if record.source is not None:
        write(record_path(sweep, job.name), replace(read(record_path(sweep, job.name)), source=None))
    return os.path.lexists(run_dir)


def _link_to_best(sweep: Sweep, job: Job, others: list[OtherJob]) -> bool:
    """Link `job` to a job in `others` with the same settings, if there is one. Return True if the job was linked.

    If several jobs have the same settings, a finished job is preferred, then the job with the most steps.
    """
    same = [other for other in others if _is_same(job, other)]
    if not same or job.run_dir is None:
        return False
    best = max(same, key=lambda other: (_status(other) == FINISHED, newest_step(other.run_dir)))
    path = record_path(sweep, job.name)
    record = read(path)
    source = os.path.relpath(best.path.resolve(), path.parent.resolve())
    # If the process is killed between the next two lines, the next sweep creates the link in `_is_placed`.
    write(path, replace(record, source=source))
    best.run_dir.mkdir(exist_ok=True)
    try:
        _link(job.run_dir, best.run_dir)
    except OSError:  # the file system does not support links
        write(path, record)
        return False
    return True


def _is_same(job: Job, other: OtherJob) -> bool:
    """Return True if `other`, a job of another sweep, has started and has the same settings as `job`.

    If the run directory of `other` contains settings, these settings are compared. The process of a job writes them
    shortly after it starts. Until then, the settings in the record of `other` (a file in the folder of its sweep) are
    compared. In this case, `other` must also be running or submitted to Slurm.
    """
    if other.record.digest not in (None, job.digest):
        return False
    if (other.run_dir / "config.yaml").exists():
        return stored_digest(other.run_dir) == job.digest
    if other.record.digest is None:
        return False
    return _status(other) == RUNNING or submitted_job(slurm_dir(other.run_dir)) is not None


def _status(other: OtherJob) -> str:
    return status_of(other.sweep, other.path.stem, other.record)


def _link(path: Path, target: Path) -> None:
    """Create the symbolic link `path` to the folder `target`.

    The link is relative, so that the folder that contains all sweeps can be moved.
    """
    path.symlink_to(os.path.relpath(target.resolve(), path.parent.resolve()), target_is_directory=True)
