"""What is evaluated: the network of a run or of a weight file."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from command_line import Cli, result
from sslcli.data.sources.base import Shapes
from sslcli.runs.subject import has_other_images_than_run

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
    assert found["transform"].endswith("px, normalized with mean [0.5, 0.5, 0.5] and std [0.25, 0.25, 0.25]")


def test_a_prefix_is_found_and_a_backbone_of_another_size_is_refused(weights: Path, cli: Cli) -> None:
    line = [f"weights={weights}", *OTHER, "protocol=knn", "baselines=false"]
    state = torch.load(weights, weights_only=True)
    shifted = {f"momentum_encoder.{key}": value + 1 for key, value in state.items()}
    head = {"projector.0.weight": torch.zeros(4, 256)}
    torch.save({f"module.{key}": value for key, value in state.items()} | shifted | head, weights)
    ended = cli("ssl-eval", *line, "backbone=small", "dataset.mean=[0.1,0.2,0.3]")
    assert (ended.code, ended.err) == (0, "")
    said = "".join(ended.out.split("\n"))
    assert "with the prefix module.; dropped: momentum_encoder.* (" in said
    assert "projector.* (1)" in said
    assert "normalized with mean [0.1, 0.2, 0.3] and std [0.25, 0.25, 0.25]" in said
    found = result(weights.with_name("net.pt.eval"), "knn_shapes-*")
    assert (found["weights_prefix"], found["weights_taken"]) == ("module.", len(state))
    assert found["weights_dropped"]["projector.*"] == 1
    ended = cli("ssl-eval", *line, "backbone=small", "weights_prefix=momentum_encoder")
    assert "with the prefix momentum_encoder.;" in "".join(ended.out.split("\n"))
    ended = cli("ssl-eval", *line, "backbone=small", "backbone.width=16")
    assert ended.code == 2
    assert "block1.0.weight is (32, 3, 3, 3) and should be (16, 3, 3, 3)" in ended.err
    assert "backbone=small backbone.width=32" in ended.err


def test_a_run_as_weights_is_the_run(trained: Path, cli: Cli) -> None:
    ended = cli("ssl-eval", f"weights=run:{trained}", "protocol=knn", "baselines=false")
    assert (ended.code, ended.err) == (0, "")
    assert result(trained / "eval", "knn")["run"] == str(trained)
    ended = cli("ssl-eval", f"weights=run:{trained}", "weights_prefix=head")
    assert ended.code == 2
    assert "remove weights_prefix" in ended.err


def test_pretrained_weights_of_timm_are_measured(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")
    create = timm.create_model

    def offline(name: str, *, pretrained: bool = False, **options: Any) -> torch.nn.Module:
        if pretrained and name != "resnet10t":
            raise OSError("no network")
        return create(name, **options)  # type: ignore[no-any-return]

    monkeypatch.setattr(timm, "create_model", offline)
    line = [*OTHER, "protocol=knn", "baselines=false"]
    ended = cli("ssl-eval", "weights=timm:resnet10t", *line)
    assert (ended.code, ended.err) == (0, "")
    found = result(tmp_path / "timm_resnet10t.eval", "knn_shapes-*")
    assert (found["weights"], found["backbone"]) == ("timm:resnet10t", "sslcli.backbones.timm.Timm")
    assert "normalized with mean [0.485, 0.456, 0.406]" in "".join(ended.out.split("\n"))
    ended = cli("ssl-eval", "weights=timm:resnet18", *line)
    assert ended.code == 2
    assert "OSError: no network" in ended.err


def test_weights_need_a_backbone_and_a_data_set(weights: Path, cli: Cli) -> None:
    refusal = cli("ssl-eval", f"weights={weights}", *OTHER).err
    assert "requires backbone=..." in refusal
    assert "the file holds the small backbone: backbone=small backbone.width=32" in refusal
    ended = cli("ssl-eval", f"weights={weights}", "backbone=resnet18", "backbone.image_size=32")
    assert ended.code == 2
    assert "requires dataset=..." in ended.err


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
