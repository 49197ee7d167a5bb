"""Faults around a run: it ends with one message and the right exit code, and the same command resumes it.

After every fault from which a run can resume, it ends bit-identical to the run of `reference`, which had
none, metrics included. `tests/test_faults_of_processes.py` has the faults of runs of several processes.
"""

from __future__ import annotations

import errno
import itertools
import os
import pickle
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.summary.writer.record_writer import RecordWriter

from small_runs import (
    complete,
    differences,
    family,
    last_step,
    make_folder,
    metrics,
    newest,
    start_warm,
    survivors,
    wait_for_step,
)
from sslcli.data.sources.files import ImageFiles
from sslcli.engine import checkpoint, stop
from sslcli.engine.monitor import Monitor
from sslcli.runs import directory
from sslcli.system import atomic

STEPS = 22
COMMAND = [
    "method=moco_v2",
    "method.queue_size=64",
    "backbone.width=4",
    "dataset.limit=128",
    "train.batch_size=16",
    f"train.max_steps={STEPS}",
    "train.save_every_steps=3",
    "train.save_every_epochs=0",
    "train.log_every_steps=2",
    "monitor.health_every_steps=5",
    "monitor.pictures=2",
]
FULL = "/dev/full"  # every write to it fails as on a full disk
Action = Callable[[Monitor], None]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without faults."""
    folder = tmp_path_factory.mktemp("reference")
    complete(start_warm(*COMMAND, f"run_dir={folder / 'run'}", log=folder / "log"), folder / "log")
    return folder / "run"


class Faulty:
    """A run in `folder` that meets faults."""

    def __init__(self, folder: Path) -> None:
        self.run_dir, self.log = folder / "run", folder / "log"

    def start(self, *more: str, step: int = 0, action: Action | None = None, full: str = "") -> int:
        """Run the command with `action` right after the step; return the exit code and store its output in `output`.

        The disk is full for the file named `full`.
        """
        before = len(self.log.read_text()) if self.log.exists() else 0
        prepare, given = (None, None) if action is None else (at_step, (step, action))
        if full:
            prepare, given = fill_the_disk, full
        process = start_warm(*COMMAND, f"run_dir={self.run_dir}", *more, log=self.log, prepare=prepare, given=given)
        code = process.finish()
        self.output = self.log.read_text()[before:]
        assert "Traceback" not in self.output
        return code

    def ends_as(self, reference: Path) -> bool:
        """Resume with the same command; the end must be bit-identical to that of the reference."""
        assert self.start() == 0, self.output
        assert differences(newest(self.run_dir), newest(reference)) == []
        assert metrics(self.run_dir) == metrics(reference)
        assert not list(self.run_dir.rglob("*.tmp"))
        return True


@pytest.fixture
def faulty(tmp_path: Path) -> Faulty:
    return Faulty(tmp_path)


def at_step(given: tuple[int, Action]) -> None:
    """Call `action(watch)` after `step`, before its metrics and checkpoint are written."""
    step, action = given
    real = Monitor.after_step

    def after_step(watch: Monitor, now: int, *args: Any, **kwargs: Any) -> None:
        if now == step:
            action(watch)
        real(watch, now, *args, **kwargs)

    Monitor.after_step = after_step  # type: ignore[method-assign]


def fill_the_disk(name: str) -> None:
    """Make every write of a new file of this name fail as on a full disk."""
    real = atomic.temporary_name

    def temporary_name(path: Path) -> Path:
        temporary = real(path)
        if path.name == name:
            temporary.symlink_to(FULL)
        return temporary

    atomic.temporary_name = temporary_name


def die(watch: Monitor) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_the_knn(watch: Monitor) -> None:
    def probe() -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGKILL)
        return {}

    watch.probe = probe


def get_a_signal_in_the_save(watch: Monitor) -> None:
    real = torch.save

    def save(state: Any, path: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        real(state, path)

    torch.save = save


def fill_the_disk_for_metrics(watch: Monitor) -> None:
    watch.metrics.file = open(FULL, "a")  # noqa: SIM115


def fill_the_disk_for_checkpoints(watch: Monitor) -> None:
    real = torch.save
    torch.save = lambda state, path: real(state, FULL)


def fill_the_disk_for_tensorboard(watch: Monitor) -> None:
    def write(writer: RecordWriter, data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    RecordWriter.write = write


# Signals and kills


@pytest.mark.parametrize(("step", "action"), [(8, die), (8, die_in_the_knn)])
def test_a_kill_costs_the_steps_since_the_last_checkpoint(
    faulty: Faulty, reference: Path, step: int, action: Action
) -> None:
    assert faulty.start(step=step - 1, action=action) == -signal.SIGKILL
    assert newest(faulty.run_dir)["step"] == 6
    assert faulty.ends_as(reference)
    assert "continuing from step 6" in faulty.output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_a_signal_costs_nothing(faulty: Faulty, reference: Path, number: signal.Signals) -> None:
    process = start_warm(*COMMAND, f"run_dir={faulty.run_dir}", log=faulty.log)
    wait_for_step(process, faulty.run_dir, 4)
    os.kill(process.pid, number)
    assert process.finish() == 75
    stopped = newest(faulty.run_dir)["step"]
    assert (
        f"stopped by signal {number.name} after step {stopped} of {STEPS}; the checkpoint is saved"
        in faulty.log.read_text()
    )
    assert faulty.ends_as(reference)
    assert f"continuing from step {stopped}" in faulty.output


def test_a_signal_while_a_checkpoint_is_written_waits_for_it(faulty: Faulty, reference: Path) -> None:
    assert faulty.start(step=6, action=get_a_signal_in_the_save) == 75
    assert "stopped by signal SIGTERM after step 7" in faulty.output
    assert [int(path.stem[5:]) for path in checkpoint.all_of(faulty.run_dir)] == [3, 6, 7]
    assert faulty.ends_as(reference)


def test_the_time_limit_costs_nothing(faulty: Faulty, reference: Path) -> None:
    assert faulty.start("train.max_time=0.01") == 75
    assert "stopped by the time limit after step 1" in faulty.output
    assert faulty.ends_as(reference)


def test_a_killed_data_worker_ends_the_run_with_a_message_and_the_same_command_goes_on(tmp_path: Path) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    command = [
        "dataset=folder",
        f"dataset.root={make_folder(tmp_path / 'images', broken=0)}",
        "dataset.image_size=16",
        "dataset.workers=2",
        "dataset.val_fraction=0",
        "backbone.width=4",
        "train.batch_size=8",
        "train.max_steps=400",
        "train.save_every_steps=3",
        "train.log_every_steps=1",
        "monitor.knn_every_epochs=0",
        f"run_dir={run_dir}",
    ]
    process = start_warm(*command, log=log)
    wait_for_step(process, run_dir, 5)
    worker, other = family(process.pid)
    os.kill(worker, signal.SIGKILL)
    assert process.finish() == 3
    assert survivors([other], within=5) == []
    output = log.read_text()
    assert "a data worker died" in output
    assert "lower dataset.workers" in output
    assert "Traceback" not in output
    assert not (run_dir / "done").exists()
    before = last_step(run_dir)
    complete(start_warm(*command, "dataset.workers=0", log=log), log)
    assert "continuing from step" in log.read_text().removeprefix(output)
    assert 5 <= before < last_step(run_dir) == 400


def hang(given: tuple[int, float]) -> None:
    """Let a read of an image never end once a process has made some, and a wait for images end soon after its time."""
    number, grace = given
    stop.GRACE = grace
    real, reads = ImageFiles.open, itertools.count()

    def open_image(source: ImageFiles, position: int) -> Any:
        while next(reads) >= number:
            time.sleep(1000)
        return real(source, position)

    ImageFiles.open = open_image  # type: ignore[method-assign]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("how", ["signal", "time limit", "patience"])
def test_a_run_that_waits_for_images_can_be_stopped_and_goes_on(tmp_path: Path, workers: int, how: str) -> None:
    folder = make_folder(tmp_path / "images", broken=0)
    command = [
        "dataset=folder",
        f"dataset.root={folder}",
        "dataset.image_size=16",
        "dataset.val_fraction=0",
        "dataset.workers=0",
        "backbone.width=4",
        "train.batch_size=8",
        "train.max_steps=12",
        "train.log_every_steps=1",
        "train.save_every_epochs=0",
        "train.save_every_steps=3",
        "monitor.knn_every_epochs=0",
        "monitor.pictures=0",
    ]
    whole, run_dir, log = tmp_path / "whole", tmp_path / "run", tmp_path / "log"
    complete(start_warm(*command, f"run_dir={whole}", log=log), log)
    limit = {"signal": [], "time limit": ["train.max_time=5"], "patience": ["launcher.timeout=2"]}[how]
    process = start_warm(
        *command, *limit, f"dataset.workers={workers}", f"run_dir={run_dir}", log=log, prepare=hang, given=(40, 1.0)
    )
    wait_for_step(process, run_dir, 5)  # the sixth batch never comes
    if how == "signal":
        time.sleep(1)
        os.kill(process.pid, signal.SIGTERM)
    start = time.monotonic()
    assert process.finish() == (3 if how == "patience" else 75), log.read_text()[-2000:]
    assert time.monotonic() - start < 30
    assert newest(run_dir)["step"] == (3 if how == "patience" else 5)
    assert "Traceback" not in log.read_text()
    complete(start_warm(*command, f"run_dir={run_dir}", log=log), log)
    assert differences(newest(run_dir), newest(whole)) == []
    assert metrics(run_dir) == metrics(whole)


# The disk


@pytest.mark.parametrize(
    "action", [fill_the_disk_for_metrics, fill_the_disk_for_checkpoints, fill_the_disk_for_tensorboard]
)
def test_a_disk_that_fills_up_costs_the_steps_since_the_last_checkpoint(
    faulty: Faulty, reference: Path, action: Action
) -> None:
    assert faulty.start(step=8, action=action) == 3
    assert "No space left on device" in faulty.output or "could not be written" in faulty.output
    assert "free space or repair the disk, then run the same command again to resume" in faulty.output
    assert newest(faulty.run_dir)["step"] == 6
    assert faulty.ends_as(reference)


@pytest.mark.parametrize("name", ["overrides.txt", "environment.json", "config.yaml", "views.png"])
def test_a_disk_that_is_full_at_the_start_is_told(faulty: Faulty, name: str) -> None:
    faulty.run_dir.mkdir()
    if name == "views.png":
        (faulty.run_dir / name).symlink_to(FULL)
    assert faulty.start(full=name) == 3
    assert "cannot be written (No space left on device): free space or repair the disk" in faulty.output
    assert not checkpoint.all_of(faulty.run_dir)
    assert not list(faulty.run_dir.rglob("*.tmp"))
    (faulty.run_dir / name).unlink(missing_ok=True)
    assert faulty.start("train.max_time=0.01") == 75


def test_a_disk_that_is_full_for_the_log_ends_the_log_alone(faulty: Faulty, reference: Path) -> None:
    faulty.run_dir.mkdir()
    (faulty.run_dir / "console.log").symlink_to(FULL)
    assert faulty.ends_as(reference)
    assert "console.log cannot be written (No space left on device): the log ends here" in faulty.output


def become_nobody(_: Any) -> None:
    """Lock the run directory as another user if this one is root, who may write everywhere.

    For no longer than that: the code may be where only root can read it.
    """
    real, user = directory.lock, os.geteuid()

    def lock(*args: Any, **kwargs: Any) -> Any:
        if user == 0:
            os.seteuid(65534)
        try:
            return real(*args, **kwargs)
        finally:
            os.seteuid(user)

    directory.lock = lock


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user can access."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder
        for path in folder.rglob("*"):
            path.chmod(0o755)


@pytest.mark.parametrize("locked", ["run", "run/checkpoints", "run/metrics.jsonl"])
def test_a_run_that_may_not_be_written_is_refused_before_it_trains(open_folder: Path, locked: str) -> None:
    run_dir, log = open_folder / "run", open_folder / "log"
    command = [*COMMAND, f"run_dir={run_dir}"]
    assert start_warm(*command, "train.max_time=0.01", log=log).finish() == 75
    for path in (run_dir, *run_dir.rglob("*")):
        if not path.is_symlink():
            path.chmod(0o777)
    (open_folder / locked).chmod(0o555)
    log.write_text("")
    log.chmod(0o666)
    code = start_warm(*command, log=log, prepare=become_nobody).finish()
    assert code == 2, log.read_text()
    output = log.read_text()
    assert f"{open_folder / locked}" in output
    assert "cannot be written (Permission denied)" in output
    assert "Traceback" not in output
    assert newest(run_dir)["step"] == 1


def test_a_run_directory_that_cannot_be_made_is_told_before_anything_is_trained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    log = tmp_path / "log"
    process = start_warm("train.max_steps=2", "dataset.limit=300", f"run_dir={tmp_path / 'file' / 'run'}", log=log)
    assert process.finish() == 2
    output = log.read_text()
    assert str(tmp_path / "file") in output
    assert "Traceback" not in output


# Checkpoints and other files that are not as the run left them


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


class Malice:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("ran",)


def poison(path: Path) -> None:
    path.write_bytes(pickle.dumps(Malice(), protocol=2))
    path.with_suffix(".sha256").unlink()


def test_a_damaged_newest_checkpoint_costs_the_steps_since_the_one_before(faulty: Faulty, reference: Path) -> None:
    for step, damage in [(7, truncate), (10, flip_a_bit), (13, empty), (16, poison)]:
        assert faulty.start(step=step, action=die) == -signal.SIGKILL
        path = checkpoint.all_of(faulty.run_dir)[-1]
        assert path == checkpoint.path_of(faulty.run_dir, step - 1)
        damage(path)
        assert faulty.start(step=step - 1, action=die) == -signal.SIGKILL
        assert f"{path.name}" in faulty.output
        assert "Falling back to the previous one" in faulty.output
        assert f"continuing from step {step - 4}" in faulty.output
        assert not Path("ran").exists()
    assert faulty.ends_as(reference)


def test_leftovers_and_a_torn_line_do_no_harm(faulty: Faulty, reference: Path) -> None:
    assert faulty.start(step=12, action=die) == -signal.SIGKILL
    for name in ("step-00000012.pt.tmp", "step-00000012.sha256.tmp", "last.tmp"):
        (checkpoint.folder(faulty.run_dir) / name).write_bytes(b"half")
    ended = subprocess.Popen(["true"])
    ended.wait()
    for name in ("config.yaml", "metrics.jsonl", "environment.json"):
        (faulty.run_dir / f"{name}.{atomic.machine()}-{ended.pid}-00000000.tmp").write_bytes(b"half")
    lines = faulty.run_dir / "metrics.jsonl"
    os.truncate(lines, lines.stat().st_size - 30)
    assert faulty.ends_as(reference)


def test_without_its_checkpoints_a_run_starts_anew_and_says_so(faulty: Faulty, reference: Path) -> None:
    assert faulty.start(step=9, action=die) == -signal.SIGKILL
    shutil.rmtree(checkpoint.folder(faulty.run_dir))
    assert faulty.ends_as(reference)
    assert "no checkpoint, but metrics up to step 8: the run starts from the beginning" in faulty.output


def delete(name: str, watch: Monitor) -> None:
    shutil.rmtree(watch.run_dir / name if name else watch.run_dir)


@pytest.mark.parametrize(
    ("name", "message"),
    [("", "the run directory {} was deleted, renamed or replaced"), ("tensorboard", "was deleted during the run")],
)
def test_a_run_whose_files_are_deleted_ends_with_one_message_and_starts_again(
    name: str, message: str, faulty: Faulty, reference: Path
) -> None:
    assert faulty.start(step=9, action=partial(delete, name)) == 3
    (line,) = [line for line in faulty.output.splitlines() if line.startswith("ssl-train: ")]
    assert message.format(faulty.run_dir) in line
    assert faulty.run_dir.exists() == bool(name)
    assert faulty.ends_as(reference)


def test_a_finished_run_without_its_checkpoints_stays_finished(faulty: Faulty, reference: Path) -> None:
    shutil.copytree(reference, faulty.run_dir, symlinks=True)
    shutil.rmtree(checkpoint.folder(faulty.run_dir))
    assert faulty.start() == 0
    assert "this run is finished already" in faulty.output
    assert metrics(faulty.run_dir) == metrics(reference)


def test_a_moved_and_a_copied_run_go_on_where_they_are(faulty: Faulty, reference: Path, tmp_path: Path) -> None:
    assert faulty.start(step=8, action=die) == -signal.SIGKILL
    for place in ("copied", "moved"):
        other = Faulty(tmp_path / place)
        (tmp_path / place).mkdir()
        if place == "copied":
            shutil.copytree(faulty.run_dir, other.run_dir, symlinks=True)
        else:
            faulty.run_dir.rename(other.run_dir)
        assert other.ends_as(reference)
        assert "continuing from step 6" in other.output


def test_a_checkpoint_of_an_older_version_goes_on(faulty: Faulty, reference: Path) -> None:
    assert faulty.start(step=8, action=die) == -signal.SIGKILL
    path = checkpoint.all_of(faulty.run_dir)[-1]
    state = torch.load(path, weights_only=True)
    del state["environment"]  # absent in version 1, which had other names as well
    monitor = state.pop("monitor")
    state["watch"] = monitor | {"judge": monitor.pop("detector")}
    state["processes"] = [{"rng": each["rng"], "window": each["metric_means"]} for each in state["processes"]]
    torch.save(state | {"schema": 1}, path)
    path.with_suffix(".sha256").write_text(f"{checkpoint.sha256(path)}  {path.name}\n")
    assert faulty.ends_as(reference)
    assert "continuing from step 6" in faulty.output
    assert newest(faulty.run_dir)["schema"] == checkpoint.SCHEMA


# Two at once, and the clock


def test_a_second_run_in_one_directory_is_refused_and_the_first_goes_on(faulty: Faulty, reference: Path) -> None:
    first = start_warm(*COMMAND, f"run_dir={faulty.run_dir}", log=faulty.log, prepare=at_step, given=(9, wait_for_it))
    wait_for_step(first, faulty.run_dir, 8)
    log = faulty.log.with_name("second")
    try:
        assert start_warm(*COMMAND, f"run_dir={faulty.run_dir}", log=log).finish() == 2
    finally:
        (faulty.run_dir / "go on").touch()
    assert (
        f"another run (process {first.pid} on {os.uname().nodename}) is running in {faulty.run_dir}" in log.read_text()
    )
    complete(first, faulty.log)
    assert differences(newest(faulty.run_dir), newest(reference)) == []
    assert metrics(faulty.run_dir) == metrics(reference)


def wait_for_it(watch: Monitor) -> None:
    until = time.monotonic() + 240
    while not (watch.run_dir / "go on").exists() and time.monotonic() < until:
        time.sleep(0.05)


def turn_the_clock_back(watch: Monitor) -> None:
    real = time.time
    time.time = lambda: real() - 86_400


def test_a_clock_that_goes_backwards_does_no_harm(faulty: Faulty, reference: Path) -> None:
    assert faulty.start(step=3, action=turn_the_clock_back) == 0
    assert differences(newest(faulty.run_dir), newest(reference)) == []
    assert metrics(faulty.run_dir) == metrics(reference)
