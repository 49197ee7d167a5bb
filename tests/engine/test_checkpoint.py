from __future__ import annotations

import errno
import hashlib
import multiprocessing
import os
import pickle
import resource
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from damage import Malice, empty, flip_a_bit, truncate
from sslcli.engine import checkpoint, migrations
from sslcli.errors import ConfigError, TrainingFailed
from sslcli.system import atomic
from sslcli.weights.files import load_weights

CPU = torch.device("cpu")


def state(step: int) -> dict[str, Any]:
    return {"step": step, "method": {"weight": torch.full((1000,), float(step))}, "scaler": {}}


def save(run_dir: Path, *steps: int, keep: int = 10) -> None:
    for step in steps:
        checkpoint.save(run_dir, state(step), keep=keep)


def newest_step(run_dir: Path, warnings: list[str] | None = None) -> int:
    found = checkpoint.load_newest(run_dir, device=CPU, warn=[].append if warnings is None else warnings.append)
    assert found is not None
    assert torch.equal(found["method"]["weight"], torch.full((1000,), float(found["step"])))
    return int(found["step"])


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in checkpoint.folder(run_dir).iterdir())


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, state(7), keep=3)
    loaded = checkpoint.load(path, device=CPU)
    assert loaded["step"] == 7
    assert loaded["schema"] == checkpoint.SCHEMA
    assert torch.equal(loaded["method"]["weight"], state(7)["method"]["weight"])
    assert os.readlink(tmp_path / "checkpoints" / "last") == path.name


def test_the_checksum_is_one_that_sha256sum_checks(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, state(7), keep=3)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert path.with_suffix(".sha256").read_text() == f"{digest}  {path.name}\n"


def test_sha256_is_the_digest_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    digest = checkpoint.sha256(tmp_path / "file")
    assert digest == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_run_without_checkpoints_has_no_newest(tmp_path: Path) -> None:
    assert checkpoint.load_newest(tmp_path, device=CPU, warn=pytest.fail) is None


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    save(tmp_path, 9, 10, 100, 101, keep=2)
    kept = [f"step-{step:08d}.{end}" for step in (100, 101) for end in ("pt", "sha256")]
    assert names(tmp_path) == ["last", *kept]


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, empty])
def test_a_damaged_newest_checkpoint_is_passed_over(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    save(tmp_path, 1, 2)
    damage(checkpoint.path_of(tmp_path, 2))
    warnings: list[str] = []
    assert newest_step(tmp_path, warnings) == 1
    assert len(warnings) == 1
    assert "step-00000002.pt does not match its checksum" in warnings[0]


@pytest.mark.parametrize("damage", [truncate, empty])
def test_damage_is_noticed_without_a_checksum_too(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    save(tmp_path, 1, 2)
    damage(checkpoint.path_of(tmp_path, 2))
    checkpoint.path_of(tmp_path, 2).with_suffix(".sha256").unlink()
    assert newest_step(tmp_path) == 1


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00 garbage", b"0" * 64])
def test_a_damaged_checksum_counts_as_damage(tmp_path: Path, content: bytes) -> None:
    save(tmp_path, 1, 2)
    checkpoint.path_of(tmp_path, 2).with_suffix(".sha256").write_bytes(content)
    assert newest_step(tmp_path) == 1


def test_a_folder_in_place_of_a_checkpoint_is_passed_over(tmp_path: Path) -> None:
    save(tmp_path, 1)
    checkpoint.path_of(tmp_path, 2).mkdir()
    checkpoint.path_of(tmp_path, 2).with_suffix(".sha256").write_text("0")
    assert newest_step(tmp_path) == 1


def test_no_damaged_byte_makes_loading_crash(tmp_path: Path) -> None:
    path = tmp_path / "some.pt"
    torch.save(state(1), path)
    whole = path.read_bytes()
    places = range(0, len(whole), max(1, len(whole) // 300))
    for place in places:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        with suppress(ConfigError):
            load_weights(path, device=CPU)


def test_when_none_can_be_read_the_message_says_what_to_do(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    for step in (1, 2):
        truncate(checkpoint.path_of(tmp_path, step))
    with pytest.raises(ConfigError, match=r"none of the 2 checkpoints in .* can be used: delete the folder"):
        newest_step(tmp_path)


@pytest.mark.parametrize("keep", [1, 3])
def test_a_run_that_fell_back_keeps_what_it_saves_next(tmp_path: Path, keep: int) -> None:
    save(tmp_path, 10, 20, 30)
    truncate(checkpoint.path_of(tmp_path, 30))
    save(tmp_path, 25, keep=keep)
    assert newest_step(tmp_path) == 25
    assert [int(path.stem[5:]) for path in checkpoint.all_of(tmp_path)] == [10, 20, 25][-keep:]


def malicious_torch(path: Path, trace: Path) -> None:
    torch.save({**state(2), "method": Malice(trace)}, path)


def malicious_pickle(path: Path, trace: Path) -> None:
    path.write_bytes(pickle.dumps(Malice(trace), protocol=2))


@pytest.mark.parametrize("write", [malicious_torch, malicious_pickle])
def test_code_inside_a_checkpoint_is_refused_and_not_run(tmp_path: Path, write: Callable[[Path, Path], None]) -> None:
    save(tmp_path, 1)
    path, trace = checkpoint.path_of(tmp_path, 2), tmp_path / "trace"
    write(path, trace)
    with pytest.raises(ConfigError, match=r"was refused: .* more than tensors"):
        checkpoint.load(path, device=CPU)
    assert newest_step(tmp_path) == 1
    assert not trace.exists()


def test_a_checkpoint_of_a_newer_version_is_refused_and_not_passed_over(tmp_path: Path) -> None:
    save(tmp_path, 1)
    torch.save({**state(2), "schema": checkpoint.SCHEMA + 1}, checkpoint.path_of(tmp_path, 2))
    with pytest.raises(ConfigError, match=r"step-00000002\.pt is of a newer version of sslcli .*: update sslcli"):
        newest_step(tmp_path)
    assert checkpoint.path_of(tmp_path, 2).exists()


def test_a_checkpoint_of_the_first_version_is_brought_up_to_date(tmp_path: Path) -> None:
    save(tmp_path, 1)
    path = checkpoint.path_of(tmp_path, 2)
    torch.save({**state(2), "schema": 1}, path)
    before = path.read_bytes()
    found = checkpoint.load(path, device=CPU)
    assert (found["schema"], found["environment"]) == (checkpoint.SCHEMA, {})
    assert found["step"] == 2
    assert path.read_bytes() == before


def test_every_older_version_has_a_way_to_the_next() -> None:
    assert sorted(migrations.STEPS) == list(range(1, migrations.SCHEMA))


def test_another_dictionary_is_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"weight": torch.zeros(1)}, path)
    with pytest.raises(ConfigError, match="is not a checkpoint of sslcli"):
        checkpoint.load(path, device=CPU)


class Killed(BaseException):
    """Simulated SIGKILL: no cleanup runs."""


class DiesAt:
    """Wrap a function so that its nth call kills, before or after its work."""

    def __init__(self, real: Callable[..., Any], nth: int, *, after: bool) -> None:
        self.real, self.left, self.after = real, nth, after

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.left -= 1
        if self.left == 0 and not self.after:
            if self.real.__name__ == "save":
                args[1].write_bytes(b"half")
            raise Killed
        result = self.real(*args, **kwargs)
        if self.left == 0:
            raise Killed
        return result


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("name", ["save", "replace", "fsync", "symlink", "unlink"])
def test_a_save_killed_at_any_moment_leaves_a_whole_newest_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, after: bool
) -> None:
    """Killed at the first such call of a save, at the second, and so on until the save gets through."""
    owner = torch if name == "save" else os
    for nth in range(1, 20):
        run_dir = tmp_path / str(nth)
        run_dir.mkdir()
        save(run_dir, 1, 2, keep=2)
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, DiesAt(getattr(owner, name), nth, after=after))
            patched.setattr(atomic, "discard", lambda path: None)  # a killed process does not clean up
            try:
                save(run_dir, 3, keep=2)
            except Killed:
                finished = False
            else:
                finished = True
        assert newest_step(run_dir) in ((3,) if finished else (2, 3))
        save(run_dir, 4, keep=2)  # the next start cleans up
        assert newest_step(run_dir) == 4
        assert len(checkpoint.all_of(run_dir)) == 2
        assert not list(run_dir.rglob("*.tmp"))
        if finished:
            assert nth > 1, f"{name} was never called"
            return
    pytest.fail(f"{name} is called without end")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at inline_container.cc:672] . PytorchStreamWriter failed writing file\nmore"),
        OSError(errno.ENOSPC, "No space left on device"),
    ],
)
def test_a_full_disk_leaves_the_old_checkpoint_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    save(tmp_path, 1)
    before = names(tmp_path)

    def fail(state: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(
        TrainingFailed, match=r"step-00000002\.pt could not be written .*step-00000001\.pt is intact.*free space"
    ) as caught:
        save(tmp_path, 2)
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == before
    assert newest_step(tmp_path) == 1


def save_under_a_limit(run_dir: Path, answer: Any) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    try:
        save(run_dir, 2)
    except TrainingFailed as error:
        answer.send(str(error))
    else:
        answer.send("no error")


def test_a_file_size_limit_of_the_system_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 1)
    before = names(tmp_path)
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    child = context.Process(target=save_under_a_limit, args=(tmp_path, theirs))
    child.start()
    assert ours.poll(60)
    assert "step-00000002.pt could not be written" in ours.recv()
    child.join()
    assert names(tmp_path) == before
    assert newest_step(tmp_path) == 1


def test_a_worker_that_dies_during_a_save_is_not_taken_for_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    save(tmp_path, 1)
    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert newest_step(tmp_path) == 1
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_random_states_of_a_gpu_are_stored_and_restored(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate the generator of a GPU."""
    device, own = torch.device(kind, 0), torch.ones(2, dtype=torch.uint8)
    restored: list[object] = []
    monkeypatch.setattr(f"torch.{kind}.get_rng_state", lambda *device: own)
    monkeypatch.setattr(f"torch.{kind}.set_rng_state", lambda *arguments: restored.append(arguments))
    state = checkpoint.rng_state(device)
    assert set(state) == {"cpu", kind}
    torch.rand(3)
    checkpoint.set_rng_state(state, device)
    assert torch.equal(torch.get_rng_state(), state["cpu"])
    assert restored == [(own, device) if kind == "cuda" else (own,)]
    checkpoint.set_rng_state(state, torch.device("cpu"))
    checkpoint.set_rng_state({"cpu": state["cpu"]}, device)  # of a run that was started on the CPU
    assert len(restored) == 1
