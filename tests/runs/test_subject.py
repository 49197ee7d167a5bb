"""What is evaluated: the network of a run or of a weight file."""

from __future__ import annotations

import hashlib
import itertools
import re
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemWriter

from command_line import Cli, result
from sslcli.data.sources.base import Shapes
from sslcli.engine import checkpoint
from sslcli.errors import ConfigError
from sslcli.runs import directory
from sslcli.runs.subject import find_checkpoint, has_other_images_than_run, load_checkpoint, type_name
from sslcli.system import atomic

OTHER = ["dataset=shapes", "dataset.seed=1", "dataset.limit=150", "dataset.test_images=80"]


@pytest.fixture
def weights(trained: Path, tmp_path: Path) -> Path:
    """The backbone of a run as a file of its own."""
    state = torch.load(trained / "checkpoints/last", weights_only=True)["method"]
    path = tmp_path / "net.pt"
    torch.save({k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")}, path)
    return path


def test_a_bare_backbone_is_measured(weights: Path, cli: Cli) -> None:
    ended = cli("ssl-eval", f"weights={weights}", "backbone=small", *OTHER, "protocol=knn")
    assert (ended.code, ended.err) == (0, "")
    found = result(weights.with_name("net.pt.eval"), "knn_shapes-*")
    assert found["weights"] == str(weights)
    assert found["checkpoint_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert {"random", "pixels"} == found["baselines"].keys()


def test_a_backbone_whose_keys_do_not_all_match_is_refused_with_their_names(weights: Path, cli: Cli) -> None:
    line = [f"weights={weights}", *OTHER, "protocol=knn"]
    state = torch.load(weights, weights_only=True)
    torch.save({f"module.{key}": value for key, value in state.items()}, weights)
    ended = cli("ssl-eval", *line, "backbone=small")
    assert ended.code == 2
    assert "block1.0.weight" in ended.err
    assert "module.block1.0.weight" in ended.err
    torch.save(state, weights)
    ended = cli("ssl-eval", *line, "backbone=small", "backbone.width=16")
    assert ended.code == 2
    assert "block1.0.weight is (32, 3, 3, 3) and should be (16, 3, 3, 3)" in ended.err
    assert not list(weights.with_name("net.pt.eval").glob("*.json"))


def test_weights_need_a_backbone_and_a_data_set(weights: Path, cli: Cli) -> None:
    assert "requires backbone=..." in cli("ssl-eval", f"weights={weights}", *OTHER).err
    ended = cli("ssl-eval", f"weights={weights}", "backbone=resnet18", "backbone.image_size=32")
    assert ended.code == 2
    assert "requires dataset=..." in ended.err


def test_a_checkpoint_is_found_by_its_step_or_as_the_last(run_dir: Path) -> None:
    assert find_checkpoint(run_dir, 3) == find_checkpoint(run_dir, "last")
    with pytest.raises(ConfigError, match=r"checkpoint is 2, .*: 3$"):
        find_checkpoint(run_dir, 2)


def test_the_last_checkpoint_is_the_one_of_the_most_steps(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    for step in (100, 9, 20):
        (tmp_path / "checkpoints" / f"step-{step:08d}.pt").touch()
    assert find_checkpoint(tmp_path, "last").name == "step-00000100.pt"
    assert find_checkpoint(tmp_path, 9).name == "step-00000009.pt"


def test_a_directory_without_checkpoints_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"checkpoint is 'last', .*: none$"):
        find_checkpoint(tmp_path, "last")


def test_the_name_of_an_image_set_is_known_without_building_it() -> None:
    assert type_name({"_target_": "sslcli.data.sources.base.TorchvisionSet", "name": "CIFAR10"}) == "CIFAR10"
    assert type_name({"_target_": "sslcli.data.sources.base.Shapes", "name": None}) == "shapes"


def shapes(**values: Any) -> dict[str, Any]:
    return {"_target_": "sslcli.data.sources.base.Shapes", "limit": 20, "test_images": 10, **values}


def test_the_fingerprint_decides_where_the_paths_of_two_sets_differ() -> None:
    source = Shapes(image_size=32, limit=20, test_images=10)
    own = {"_target_": "sslcli.data.sources.files.Folder", "root": "/there"}
    moved = own | {"root": "/here"}
    facts = {"training images": len(source.splits["train"]), "image fingerprint": source.fingerprint}
    assert not has_other_images_than_run(source, moved, own, facts, trust=[])
    assert has_other_images_than_run(source, moved, own, facts | {"image fingerprint": "another"}, trust=[])


def test_other_settings_are_other_images_whatever_the_fingerprint() -> None:
    source = Shapes(image_size=32, limit=20, test_images=10)
    facts = {"training images": len(source.splits["train"]), "image fingerprint": source.fingerprint}
    assert has_other_images_than_run(source, shapes(seed=1), shapes(), facts, trust=[])
    assert not has_other_images_than_run(
        source, shapes(workers=1), shapes(), facts | {"image fingerprint": ""}, trust=[]
    )


def test_without_a_fingerprint_the_number_of_training_images_is_compared() -> None:
    source = Shapes(image_size=32, limit=20, test_images=10)
    own = {"_target_": "sslcli.data.sources.files.Folder", "root": "/nonesuch", "image_size": 32}
    moved = own | {"root": "/here"}
    count = len(source.splits["train"])
    assert not has_other_images_than_run(source, moved, own, {"training images": count}, trust=[])
    assert has_other_images_than_run(source, moved, own, {"training images": count + 1}, trust=[])


@pytest.mark.parametrize("is_sharded", [False, True])
def test_a_checkpoint_that_is_deleted_while_it_is_opened_is_followed_by_the_newest(
    is_sharded: bool, tmp_path: Path
) -> None:
    """A thread replaces the only checkpoint as fast as it can, as a run with train.keep=1 does."""
    saved, stop = {"seed": 0, "method": {"_target_": "x"}}, threading.Event()
    old = tmp_path / "old.pt"
    torch.save({"schema": 3, "step": 1, "method": {"weight": torch.zeros(9)}, "config": saved}, old)

    def rotate() -> None:
        for step in itertools.count(1):
            if is_sharded:
                replace_folder(tmp_path, step)
            else:
                checkpoint.save(tmp_path, {"step": step, "method": {"weight": torch.full((9,), step)}}, keep=1)
            if stop.is_set():
                return

    thread = threading.Thread(target=rotate)
    thread.start()
    try:
        while not checkpoint.all_of(tmp_path):
            pass
        with directory.lock(tmp_path):
            for _ in range(40):
                loaded = load_checkpoint(tmp_path, "last", saved)
                assert int(loaded.weights["weight"][0]) == loaded.step
    finally:
        stop.set()
        thread.join()


def replace_folder(run_dir: Path, step: int) -> None:
    """Replace the only checkpoint by a sharded one, as `Writer` does on one process."""
    path = checkpoint.path_of(run_dir, step).with_suffix("")
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.mkdir()
    tensor = torch.full((9,), step)
    dcp.save({"method/weight": tensor}, storage_writer=FileSystemWriter(temporary), no_dist=True)
    rest = {"state": {"schema": 3, "step": step}, "places": {"method/weight": ("method", "weight")}}
    torch.save(rest, temporary / "rest.pt")
    sums = "".join(f"{atomic.sha256(file)}  {file.name}\n" for file in sorted(temporary.iterdir()))
    (temporary / "SHA256SUMS").write_text(sums)
    checkpoint.publish(temporary, path)
    checkpoint.prune(path, keep=1)


def test_a_checkpoint_that_does_not_exist_is_refused_at_once_if_no_run_is_at_work(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, {"step": 3, "method": {}}, keep=1)
    with pytest.raises(ConfigError, match="has checkpoints of the steps: 3"):
        load_checkpoint(tmp_path, 2, {})
    checkpoint.path_of(tmp_path, 3).write_bytes(b"")
    with pytest.raises(ConfigError, match="does not match its checksum"):
        load_checkpoint(tmp_path, "last", {})


def test_a_checkpoint_of_another_run_is_not_evaluated(tmp_path: Path) -> None:
    saved = {"seed": 0, "method": {"_target_": "x"}, "train": {"epochs": 20}}
    checkpoint.save(tmp_path, {"step": 3, "method": {}, "config": saved | {"seed": 1}}, keep=1)
    with pytest.raises(ConfigError, match="what differs: seed: 1 -> 0"):
        load_checkpoint(tmp_path, "last", saved)
    checkpoint.save(tmp_path, {"step": 4, "method": {}, "config": saved | {"train": {"epochs": 10}}}, keep=1)
    assert load_checkpoint(tmp_path, "last", saved).step == 4


EXPORT = {
    "state_dict": {},
    "what": "backbone",
    "backbone": {"_target_": "x"},
    "image_size": 32,
    "mean": [0.5],
    "std": [0.5],
    "views": {},
    "precision": "fp32",
    "provenance": {},
}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"image_size": "32"}, "image_size is '32'"),
        ({"backbone": None}, "backbone is None"),
        ({"mean": 0.5}, "mean is 0.5"),
        ({"state_dict": []}, r"state_dict is \[\]"),
        ({"monitor": 3}, "monitor is 3"),
    ],
)
def test_a_damaged_export_is_refused_with_its_name(
    changes: dict[str, Any], reason: str, cli: Cli, tmp_path: Path
) -> None:
    path = tmp_path / "a.pt"
    torch.save(EXPORT | changes, path)
    ended = cli("ssl-eval", f"weights={path}", "dataset=shapes", "protocol=knn")
    assert ended.code == 2
    assert re.search(rf"{path} is damaged \({reason}.*\): export it again with ssl-export", ended.err)
    assert ended.err.count("\n") == 1
