"""What is evaluated: the network of a run or of a weight file."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch

from command_line import Cli, result
from sslcli.data.sources.base import Shapes
from sslcli.errors import ConfigError
from sslcli.runs.subject import find_checkpoint, has_other_images_than_run, type_name

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
