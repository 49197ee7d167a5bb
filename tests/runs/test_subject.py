"""What is evaluated: the network of a run or of a weight file."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from command_line import Cli, result

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
    assert "needs backbone=..." in cli("ssl-eval", f"weights={weights}", *OTHER).err
    ended = cli("ssl-eval", f"weights={weights}", "backbone=resnet18", "backbone.image_size=32")
    assert ended.code == 2
    assert "needs dataset=..." in ended.err
