from __future__ import annotations

import errno
import fcntl
import os
import platform
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from sslcli.errors import ConfigError
from sslcli.runs.description import write_description
from sslcli.runs.directory import check_resumable, is_finished, lock, read_config
from sslcli.system.stored import DamagedFile

CONFIG: dict[str, Any] = {
    "seed": 0,
    "resume": "auto",
    "run_dir": "out",
    "launcher": {"threads": 2},
    "method": {"_target_": "sslcli.methods.byol.BYOL", "momentum": 0.99},
    "train": {"epochs": 10, "max_time": None},
}


def changed(**changes: Any) -> dict[str, Any]:
    return CONFIG | changes


def started(run_dir: Path) -> Path:
    """Create the directory of a run of CONFIG, without checkpoint."""
    run_dir.mkdir()
    write_description(
        run_dir,
        CONFIG,
        overrides=["method=byol", "seed=0"],
        effective={"steps": 3},
        execution={"device": "cpu", "threads": 1},
        warn=pytest.fail,
    )
    return run_dir


@contextmanager
def unprivileged() -> Iterator[None]:
    """Run the block as a user without root's rights."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_a_lock_names_its_holder_and_is_free_after_it(tmp_path: Path) -> None:
    run_dir = tmp_path / "deep" / "run"
    held = lock(run_dir)
    holder = f"process {os.getpid()} on {platform.node()}"
    with pytest.raises(ConfigError) as refused:
        lock(run_dir, patience=0)
    assert str(refused.value) == (
        f"another run ({holder}) is running in {run_dir}: wait for it, or choose another run_dir"
    )
    held.close()
    lock(run_dir, patience=0).close()
    assert (run_dir / ".lock").read_text() == holder  # the last holder alone


def test_a_lock_waits_for_a_run_that_is_about_to_end(tmp_path: Path) -> None:
    held = lock(tmp_path)
    ending = threading.Timer(0.3, held.close)
    ending.start()
    before = time.monotonic()
    lock(tmp_path, patience=60).close()
    assert 0.2 < time.monotonic() - before < 30
    ending.join()


def test_a_file_system_without_locks_is_used_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(file: Any, operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    lock(tmp_path, patience=60).close()
    assert capsys.readouterr().err == (
        f"ssl-train: {tmp_path} cannot be locked (Function not implemented): do not start a second run in it\n"
    )


def test_a_directory_that_cannot_be_written_is_refused_naming_it_and_the_reason() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o555)
        for run_dir in (folder, folder / "run"):
            with unprivileged(), pytest.raises(ConfigError) as refused:
                lock(run_dir)
            assert str(refused.value) == (
                f"run_dir is {run_dir}, but it cannot be written (Permission denied): choose another"
            )
        folder.chmod(0o755)


def test_what_differs_is_listed_and_what_changes_nothing_is_not(tmp_path: Path) -> None:
    run_dir = started(tmp_path / "run")
    neutral = {"run_dir": "elsewhere", "launcher": {"threads": 8}, "_lines_": []}
    check_resumable(run_dir, changed(**neutral))
    train = {"epochs": 20, "max_time": "5m", "clip_grad": 1.0}
    method = {"_target_": "sslcli.methods.moco.MoCo"}
    with pytest.raises(ConfigError) as refused:
        check_resumable(run_dir, changed(**neutral, train=train, method=method, seed=1))
    output = str(refused.value).partition("what differs: ")[2].partition(". Use the same values to resume")[0]
    assert output.split("; ") == [
        "method._target_: sslcli.methods.byol.BYOL -> sslcli.methods.moco.MoCo",
        "method.momentum: 0.99 -> not set",
        "seed: 0 -> 1",
        "train.clip_grad: not set -> 1.0",
        "train.epochs: 10 -> 20",
    ]


def test_a_file_is_no_run_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="that is a file: choose a directory"):
        check_resumable(tmp_path / "file", CONFIG)


def test_a_directory_without_a_run_may_be_used_unless_there_must_be_one(tmp_path: Path) -> None:
    for resume in ("auto", "never"):
        check_resumable(tmp_path, changed(resume=resume))
        check_resumable(tmp_path / "new", changed(resume=resume))
    with pytest.raises(ConfigError, match="contains no checkpoint"):
        check_resumable(tmp_path, changed(resume="must"))


def test_a_key_may_differ_if_the_caller_allows_it(tmp_path: Path) -> None:
    run_dir = started(tmp_path / "run")
    longer = changed(train={"epochs": 20, "max_time": None})
    check_resumable(run_dir, longer, may_differ=["train.epochs"])
    with pytest.raises(ConfigError, match=r"train\.epochs: 10 -> 20"):
        check_resumable(run_dir, longer, may_differ=["train.batch_size"])


def test_the_configuration_is_read_as_it_was_written(tmp_path: Path) -> None:
    run_dir = started(tmp_path / "run")
    expected = {key: value for key, value in CONFIG.items() if not key.startswith("_")}
    assert read_config(run_dir) == expected | {"effective": {"steps": 3}}
    assert (run_dir / "overrides.txt").read_text() == "method=byol\nseed=0\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "it has no config.yaml"), ("[1, 2]", r"its content is \[1, 2\]"), ("seed: 0", "it has no method")],
)
def test_other_directories_are_not_taken_for_runs(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_config(tmp_path)


def test_a_run_is_finished_once_it_says_so(tmp_path: Path) -> None:
    assert not is_finished(tmp_path)
    (tmp_path / "done").write_text("")
    assert is_finished(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        ".lock",
        "config.yaml",
        "console.log",
        "done",
        "environment.json",
        "images.npz",
        "metrics.jsonl",
        "checkpoints/step-00000005.sha256",
        "checkpoints/step-00000005/SHA256SUMS",
        "eval/features/a.pt",
        "slurm/job",
    ],
)
def test_a_fifo_in_a_run_directory_is_named_before_anything_waits_for_it(name: str, tmp_path: Path) -> None:
    run_dir = started(tmp_path / "run")
    path = run_dir / name
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(path)
    for read in (lambda: check_resumable(run_dir, CONFIG), lambda: read_config(run_dir)):
        with pytest.raises(ConfigError, match=rf"{name} is a FIFO, but it must be a regular file: remove it"):
            read()


def test_a_file_in_the_place_of_a_folder_and_the_other_way_are_refused(tmp_path: Path) -> None:
    run_dir = started(tmp_path / "run")
    (run_dir / "tensorboard").write_text("")
    with pytest.raises(ConfigError, match="tensorboard is a file, but it must be a folder"):
        check_resumable(run_dir, CONFIG)
    (run_dir / "tensorboard").unlink()
    (run_dir / "metrics.jsonl").mkdir()
    with pytest.raises(ConfigError, match=r"metrics.jsonl is a folder, but it must be a regular file"):
        read_config(run_dir)


BOMB = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in pairwise("abcdefghijklmnopqrstu"))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"seed: !!python/object/apply:os.getcwd []\nmethod: x",
        b"method: [",
        b"method: \xff",
        b"[" * 100_000,
        BOMB.encode(),
        b"a: &a [*a]\n",
    ],
    ids=["empty", "object", "unclosed", "no UTF-8", "deep", "aliases", "circle"],
)
def test_a_damaged_configuration_is_refused_and_runs_nothing(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    for read in (lambda: check_resumable(tmp_path, CONFIG), lambda: read_config(tmp_path)):
        with pytest.raises(DamagedFile, match=r"config.yaml is damaged \(.*\): restore a copy"):
            read()
    assert path.read_bytes() == content


def test_a_configuration_that_was_cut_at_any_byte_is_refused(tmp_path: Path) -> None:
    path = started(tmp_path / "run") / "config.yaml"
    content = path.read_bytes()
    for end in range(0, content.index(b"effective"), 7):
        path.write_bytes(content[:end])
        with pytest.raises(DamagedFile, match=r"config.yaml is damaged"):
            read_config(path.parent)
