"""Checkpoints that several processes write together, in the background of training."""

from __future__ import annotations

import errno
import hashlib
import os
import pickle
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra._internal.utils import get_args_parser
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.optim import Optimizer

from damage import Malice, empty, flip_a_bit, truncate
from processes import Pair
from small_runs import differences, last_step, metrics, newest
from sslcli.cli.compose import checked_jobs
from sslcli.config.run_config import RunConfig
from sslcli.config.settings import ExportSettings
from sslcli.distributed import collectives
from sslcli.engine import checkpoint, fsdp, sharded_checkpoint
from sslcli.engine.checkpoint_writer import Writer
from sslcli.errors import ConfigError, TrainingFailed
from sslcli.methods.base import Method
from sslcli.methods.byol import BYOL
from sslcli.runs import export, worker
from sslcli.system import atomic
from tiny import make_batch, mine, vit

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    trio = Pair(tmp_path_factory.mktemp("trio"), size=3)
    yield trio
    trio.stop()


def assembled(*, seed: int) -> tuple[Method, Optimizer]:
    """A method, sharded where there are several processes, and its optimizer."""
    torch.manual_seed(seed)
    method = BYOL(vit(), dim=5, hidden=7)  # rows that neither 2 nor 3 divides
    if collectives.world_size() > 1:
        fsdp.shard(method, CPU, "fp32")
    return method, torch.optim.AdamW(method.parameters(), lr=1e-3)


def state_of(method: Method, optimizer: Optimizer, step: int) -> dict[str, Any]:
    return {"step": step, "method": method.state_dict(), "optimizer": optimizer.state_dict(), "processes": [step]}


def digest(state: dict[str, Any]) -> str:
    """Return the digest of all tensors, gathered."""
    found = hashlib.sha256()

    def add(node: Any) -> None:
        for key, value in node.items() if isinstance(node, dict) else ():
            found.update(str(key).encode())
            if isinstance(value, Tensor):
                found.update(collectives.whole(value.detach()).contiguous().numpy().tobytes())
            add(value)

    add({key: state[key] for key in ("step", "method", "optimizer")})
    return found.hexdigest()


def saved(run_dir: Path, steps: int, keep: int = 10) -> list[str]:
    """Train, with a checkpoint after every step; their digests."""
    method, optimizer = assembled(seed=0)
    writer = Writer(run_dir, sharded=fsdp.is_sharded(method))
    digests = []
    for step in range(1, steps + 1):
        method(mine(make_batch(8, seed=step)))["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(0.5)
        state = state_of(method, optimizer, step)
        writer.save(state, keep=keep)
        digests.append(digest(state))
    writer.close()
    return digests


def loaded(run_dir: Path) -> tuple[int, str, list[str]]:
    """Load the newest checkpoint in another start; return step, digest and warnings."""
    method, optimizer = assembled(seed=1)
    method(mine(make_batch(12)))["loss"].backward()
    warnings: list[str] = []
    like = fsdp.placement(method, optimizer) if fsdp.is_sharded(method) else None
    found = checkpoint.load_newest(run_dir, device=CPU, warn=warnings.append, like=like)
    assert found is not None
    assert found["processes"] == [found["step"]]
    method.load_state_dict(found["method"])
    optimizer.load_state_dict(found["optimizer"])
    return found["step"], digest(state_of(method, optimizer, found["step"])), warnings


@pytest.fixture(scope="module")
def three_steps(tmp_path_factory: pytest.TempPathFactory, pair: Pair) -> tuple[Path, list[str]]:
    """A run of two processes that saved after each of three steps, and the digests of what it saved."""
    run_dir = tmp_path_factory.mktemp("pieces")
    first, second = pair.run(saved, run_dir, 3)
    assert first == second
    return run_dir, first


@pytest.fixture
def copied(three_steps: tuple[Path, list[str]], tmp_path: Path) -> tuple[Path, list[str]]:
    subprocess.run(["cp", "-a", f"{three_steps[0]}/checkpoints", str(tmp_path)], check=True)
    return tmp_path, three_steps[1]


def test_one_two_and_three_processes_load_the_same_numbers(
    three_steps: tuple[Path, list[str]], pair: Pair, trio: Pair
) -> None:
    run_dir, digests = three_steps
    found = [loaded(run_dir), *pair.run(loaded, run_dir), *trio.run(loaded, run_dir)]
    assert found == [(3, digests[-1], [])] * 6


def test_a_plain_checkpoint_loads_where_parameters_are_sharded(tmp_path: Path, pair: Pair, trio: Pair) -> None:
    digests = saved(tmp_path, 2)
    assert checkpoint.all_of(tmp_path)[-1].suffix == ".pt"
    assert [*pair.run(loaded, tmp_path), *trio.run(loaded, tmp_path)] == [(2, digests[-1], [])] * 5


def test_the_folder_holds_what_its_checksums_say(three_steps: tuple[Path, list[str]]) -> None:
    folder = checkpoint.all_of(three_steps[0])[-1]
    names = {".metadata", "__0_0.distcp", "__1_0.distcp", "rest.pt", "SHA256SUMS"}
    assert {path.name for path in folder.iterdir()} == names
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=folder, check=True, capture_output=True)
    assert len((folder / "SHA256SUMS").read_text().splitlines()) == len(names) - 1
    assert os.readlink(folder.parent / "last") == folder.name == "step-00000003"
    sizes = [(folder / f"__{rank}_0.distcp").stat().st_size for rank in (0, 1)]
    assert max(sizes) < 2 * min(sizes), "each process writes its part"


def test_only_the_newest_are_kept(tmp_path: Path, pair: Pair) -> None:
    saved(tmp_path, 1)  # a plain one, by one process
    pair.run(saved, tmp_path, 4, 2)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["last", "step-00000003", "step-00000004"]


DAMAGED = ["__1_0.distcp", "__0_0.distcp", ".metadata", "rest.pt", "SHA256SUMS"]


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_passed_over_by_all_processes_alike(copied: tuple[Path, list[str]], pair: Pair, name: str) -> None:
    run_dir, digests = copied
    flip_a_bit(run_dir / "checkpoints/step-00000003" / name)
    for step, found, warnings in (loaded(run_dir), *pair.run(loaded, run_dir)):
        assert (step, found) == (2, digests[1])
        assert len(warnings) == 1
        assert "step-00000003" in warnings[0]


@pytest.mark.parametrize("damage", [truncate, empty, Path.unlink])
def test_missing_bytes_are_noticed(copied: tuple[Path, list[str]], damage: Callable[[Path], None]) -> None:
    for name in DAMAGED:
        folder = copied[0] / "checkpoints/step-00000003"
        before = (folder / name).read_bytes()
        damage(folder / name)
        with pytest.raises(ConfigError, match="step-00000003"):
            checkpoint.load(folder, device=CPU)
        (folder / name).write_bytes(before)
    assert loaded(copied[0])[0] == 3


def test_a_run_that_fell_back_replaces_what_is_damaged(copied: tuple[Path, list[str]], pair: Pair) -> None:
    run_dir, digests = copied
    truncate(run_dir / "checkpoints/step-00000003/rest.pt")
    assert pair.run(saved, run_dir, 3)[0] == digests
    assert loaded(run_dir) == (3, digests[-1], [])


@pytest.mark.parametrize("name", [".metadata", "rest.pt"])
def test_code_in_a_checkpoint_is_refused_and_not_run(copied: tuple[Path, list[str]], tmp_path: Path, name: str) -> None:
    folder, trace = copied[0] / "checkpoints/step-00000003", tmp_path / "trace"
    (folder / name).write_bytes(pickle.dumps(Malice(trace), protocol=2))
    sums = [line for line in (folder / "SHA256SUMS").read_text().splitlines() if not line.endswith(f" {name}")]
    sums.append(f"{checkpoint.sha256(folder / name)}  {name}")
    (folder / "SHA256SUMS").write_text("\n".join(sums))
    with pytest.raises(ConfigError, match="cannot be read"):
        checkpoint.load(folder, device=CPU)
    assert not trace.exists()


@pytest.mark.parametrize("name", ["os.system", "Path", "os"])
def test_an_index_may_not_name_what_its_module_imports(copied: tuple[Path, list[str]], name: str) -> None:
    folder = copied[0] / "checkpoints/step-00000003"
    module = "torch.distributed.checkpoint.filesystem"
    text = b"\x80\x04\x8c" + bytes([len(module)]) + module.encode() + b"\x8c" + bytes([len(name)]) + name.encode()
    (folder / ".metadata").write_bytes(text + b"\x93.")
    with pytest.raises(pickle.UnpicklingError):
        sharded_checkpoint.index_of(folder)


def changed_at_once(run_dir: Path) -> tuple[bool, str]:
    """Whether a checkpoint was there before its writing was let go on, weights being changed meanwhile; its digest."""
    method, optimizer = assembled(seed=0)
    writer, gate, write = Writer(run_dir, sharded=True), threading.Event(), sharded_checkpoint.write

    def patient(*arguments: Any, **options: Any) -> None:
        gate.wait(60)
        write(*arguments, **options)

    sharded_checkpoint.write = patient
    try:
        state = state_of(method, optimizer, 1)
        before = digest(state)
        writer.save(state, keep=1)
        with torch.no_grad():
            for parameter in method.parameters():
                collectives.local(parameter).add_(100)
        early = bool(checkpoint.all_of(run_dir))
        gate.set()
        writer.close()
    finally:
        sharded_checkpoint.write = write
    return early, before


def test_a_save_returns_at_once_and_holds_the_numbers_of_that_moment(tmp_path: Path, pair: Pair) -> None:
    (early, before), _ = pair.run(changed_at_once, tmp_path)
    assert not early
    state = checkpoint.load(checkpoint.all_of(tmp_path)[0], device=CPU)
    assert digest(state | {"optimizer": state["optimizer"]}) == before


def refused_by_the_disk(run_dir: Path) -> str:
    """The second of three saves fails on process 1; return the message of the error that the third raises."""
    method, optimizer = assembled(seed=0)
    writer, write = Writer(run_dir, sharded=True), FileSystemWriter.write_data

    def full(*arguments: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    try:
        writer.save(state_of(method, optimizer, 1), keep=3)
        writer.wait()
        if collectives.rank() == 1:
            FileSystemWriter.write_data = full  # type: ignore[method-assign]
        writer.save(state_of(method, optimizer, 2), keep=3)
        try:
            writer.save(state_of(method, optimizer, 3), keep=3)
        except TrainingFailed as error:
            return str(error)
        return ""
    finally:
        FileSystemWriter.write_data = write  # type: ignore[method-assign]


def test_a_full_disk_is_told_to_all_processes_and_leaves_the_earlier_ones(tmp_path: Path, pair: Pair) -> None:
    for message in pair.run(refused_by_the_disk, tmp_path):
        assert "step-00000002 could not be written" in message
        assert "No space left on device" in message
        assert "step-00000001 is intact" in message
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["last", "step-00000001"]


def exported(run_dir: Path) -> set[str]:
    """The names in the file of a whole method, once its numbers and those of its backbone are found to be the same."""
    state = newest(run_dir)["method"]
    found = {}
    for what in ("backbone", "method"):
        path = run_dir / f"{what}.pt"
        settings = {"run": str(run_dir), "checkpoint": "last", "format": "torch", "trust": []}
        assert export.run(ExportSettings(**settings, what=what, out=str(path))) == 0
        found[what] = torch.load(path, weights_only=True)["state_dict"]
    assert (
        differences(
            {f"backbone.{name}": value for name, value in found["backbone"].items()},
            {
                name: value
                for name, value in state.items()
                if name.startswith("backbone.") and not name.endswith("noise._extra_state")
            },
        )
        == []
    )
    assert differences(found["method"], state) == []
    return set(found["method"])


STEPS = 10
RUN = [
    "method=byol",
    "method.hidden=16",
    "method.dim=8",
    "backbone=vit_tiny",
    "backbone.width=16",
    "backbone.depth=2",
    "backbone.num_heads=2",
    "backbone.drop_path=0.2",
    "dataset=shapes",
    "dataset.train_images=64",
    "dataset.test_images=0",
    "device=cpu",
    "launcher.threads=1",
    "optimizer=lars",
    "train.batch_size=16",
    "train.precision=bf16",
    "train.clip_grad=1",
    "train.sharding=fsdp",
    "train.activation_checkpointing=true",
    f"train.max_steps={STEPS}",
    "train.save_every_steps=2",
    "train.save_every_epochs=0",
    "train.log_every_steps=1",
    "monitor.knn_every_epochs=1",
    "monitor.health_every_steps=3",
    "monitor.pictures=2",
]


def config_of(run_dir: Path, *others: str) -> RunConfig:
    """Of RUN, with other values of some of its keys."""
    keys = tuple(line.partition("=")[0] + "=" for line in others)
    lines = [*(line for line in RUN if not line.startswith(keys)), *others, f"run_dir={run_dir}"]
    config = checked_jobs("train", get_args_parser().parse_args(lines))[0]
    return RunConfig.from_plain(config | {"run_dir": str(run_dir)})


def killed_while_saving(config: RunConfig) -> int:
    """Process 1 dies when its files of the checkpoint of step 6 are written and the run is two steps further."""
    run_dir, digest = config.directory, sharded_checkpoint.sha256

    def fatal(path: Path) -> str:
        if path.parent.name.startswith("step-00000006.") and path.suffix == ".distcp" and collectives.rank() == 1:
            until = time.monotonic() + 60
            while last_step(run_dir) < 8 and time.monotonic() < until:
                time.sleep(0.01)
            assert last_step(run_dir) == 8, "training does not go on while a checkpoint is written"
            os.kill(os.getpid(), signal.SIGKILL)
        return digest(path)

    sharded_checkpoint.sha256 = fatal
    return worker.run(config)


def test_a_run_killed_while_it_saves_ends_as_one_never_stopped(tmp_path: Path, pair: Pair) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert pair.run(worker.run, config_of(whole)) == [0, 0]
    doomed = Pair(tmp_path)
    with pytest.raises(AssertionError, match="process 1 of 2: it died"):
        doomed.run(killed_while_saving, config_of(resumed))
    folder = resumed / "checkpoints"
    left = sorted(folder.glob("step-*"))
    assert [path.stem.partition(".")[0] for path in left] == ["step-00000002", "step-00000004", "step-00000006"]
    assert [path.suffix for path in left] == ["", "", ".tmp"]
    assert pair.run(worker.run, config_of(resumed).changed(resume="must")) == [0, 0]
    assert newest(whole)["step"] == STEPS
    assert differences(newest(resumed), newest(whole)) == []
    assert metrics(resumed) == metrics(whole)
    assert {"monitor/knn_top1", "health/std", "train/loss"} <= set().union(*metrics(whole))
    assert exported(whole) == newest(whole)["method"].keys()
    assert sorted(path.name for path in folder.iterdir()) == ["last", *(f"step-{n:08d}" for n in (6, 8, 10))]


def test_a_run_of_one_process_goes_on_sharded_and_back(tmp_path: Path, pair: Pair) -> None:
    """Also with SGD, whose steps are fused where parameters are whole, and have no fused form where they are not."""
    run_dir = tmp_path / "run"

    def cut_after(step: int) -> None:
        (run_dir / "done").unlink()
        for path in run_dir.glob("checkpoints/step-*"):
            if int(path.stem[5:]) > step:
                atomic.discard(path)

    plain = config_of(run_dir, "optimizer=sgd", "train.sharding=none", "train.keep=10")
    assert worker.run(plain) == 0
    cut_after(4)
    sharded = plain.changed(train=plain.values["train"] | {"sharding": "fsdp"}, resume="must")
    assert pair.run(worker.run, sharded) == [0, 0]
    assert newest(run_dir)["step"] == STEPS
    cut_after(6)
    assert worker.run(plain.changed(resume="must")) == 0
    state = newest(run_dir)
    assert state["step"] == STEPS
    assert all(group["fused"] for group in state["optimizer"]["param_groups"])
    assert all(value.isfinite().all() for value in state["method"].values() if value.is_floating_point())
