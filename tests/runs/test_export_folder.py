from __future__ import annotations

from pathlib import Path

import pytest
import torch

from exported import trained
from sslcli.backbones.resnet import ResNet
from sslcli.errors import ConfigError
from sslcli.runs.export_check import Images, features_of
from sslcli.runs.export_folder import check_folder, check_packages, check_target, move, write_folder
from sslcli.weights.export.formats import TARGETS
from sslcli.weights.export.target import Trained
from sslcli.weights.export.torchvision import Torchvision

TARGET = Torchvision()
IMAGES = Images(torch.rand(4, 3, 32, 32), "noise")


@pytest.fixture(scope="module")
def resnet() -> Trained:
    torch.manual_seed(0)
    return trained(ResNet("resnet18", image_size=32, stem="imagenet"), size=32)


def written(target: Torchvision, one: Trained, out: Path) -> float:
    expected = features_of(one.net, one.preprocessing.normalize(IMAGES.images))
    return write_folder(target, one, out, IMAGES, expected, lambda found: f"difference {found}")


def test_a_folder_is_written_and_replaced(resnet: Trained, tmp_path: Path) -> None:
    out = tmp_path / "deep/out"
    for _ in range(2):
        check_folder(out, TARGET)
        assert written(TARGET, resnet, out) == 0
        assert {path.name for path in out.iterdir()} == {"model.pth", "preprocessing.json", "README.md"}
        assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert (out / "README.md").read_text() == "difference 0.0"


class Broken(Torchvision):
    """Writes other weights than it gets, or a file that cannot be loaded."""

    def __init__(self, damage: str) -> None:
        self.damage = damage

    def write(self, trained: Trained, folder: Path) -> None:
        super().write(trained, folder)
        path = folder / self.weights_file
        if self.damage == "bytes":
            path.write_bytes(b"nothing")
            return
        state = torch.load(path, weights_only=True)
        if self.damage == "key":
            del state["bn1.weight"]
        else:
            state["bn1.weight"] *= 1.01
        torch.save(state, path)


@pytest.mark.parametrize(
    ("damage", "message"), [("value", "its features on noise differ by"), ("key", "bn1.weight"), ("bytes", "loaded")]
)
def test_an_export_with_other_features_is_removed(damage: str, message: str, resnet: Trained, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="format=torchvision: the export was removed") as raised:
        written(Broken(damage), resnet, tmp_path / "out")
    assert message in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_others_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "others").mkdir()
    (tmp_path / "others/README.md").write_text("my own notes")
    check_folder(tmp_path / "empty", TARGET)
    for name, message in (("file", "a file"), ("others", "did not write .README.md"), ("x.pth", "remove .pth")):
        with pytest.raises(ConfigError, match=message):
            check_folder(tmp_path / name, TARGET)
    (tmp_path / "others/preprocessing.json").write_text("{}")
    check_folder(tmp_path / "others", TARGET)
    (tmp_path / "others/thesis.tex").write_text("")
    with pytest.raises(ConfigError, match=r"thesis\.tex"):
        check_folder(tmp_path / "others", TARGET)


def test_a_refusal_names_the_reason_and_what_is_possible(resnet: Trained) -> None:
    check_target(TARGET, resnet)
    net = trained(ResNet("resnet18", image_size=32), size=32)
    with pytest.raises(
        ConfigError, match=r"stem for small images.*backbone.stem=imagenet.*Possible formats: torch, sa"
    ):
        check_target(TARGET, net)
    diverged = trained(ResNet("resnet18", image_size=32, stem="imagenet"), size=32)
    diverged.net.get_parameter("bn1.weight").data[0] = float("nan")
    with pytest.raises(ConfigError, match=r"1 of .* tensors are not finite, bn1"):
        check_target(TARGET, diverged)
    lab = type(net.preprocessing)(**{**vars(net.preprocessing), "color_space": "lab"})
    with pytest.raises(ConfigError, match=r"views.color_space is lab.*Possible formats: torch"):
        check_target(TARGETS["safetensors"], Trained(**{**vars(net), "preprocessing": lab}))


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TARGETS["timm"].__class__, "packages", ("nonesuch",))
    with pytest.raises(ConfigError, match=r"nonesuch: pip install nonesuch"):
        check_packages(TARGETS["timm"])
    check_packages(TARGETS["safetensors"])


def test_an_older_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("")
    move(tmp_path / "new", tmp_path / "old")
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == ["old", "old/new"]
