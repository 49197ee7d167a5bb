from __future__ import annotations

import importlib.util
import os
import pickle
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sslcli.backbones.timm import Timm

REAL = importlib.util.find_spec("timm") is not None


class FakeNet(nn.Module):
    num_features = 999  # differs from the actual output width, as in timm's mobilenets

    def __init__(self, channels: int, maps: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 6, 3)
        self.maps = maps

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.conv(images)
        return out if self.maps else out.mean((2, 3))


class FakeTimm(ModuleType):
    __version__ = "0"
    calls: list[dict[str, Any]]

    def __init__(self) -> None:
        super().__init__("timm")
        self.calls = []

    def list_models(self) -> list[str]:
        return ["resnet18", "resnet34", "vit_tiny_patch16_224", "maps"]

    def is_model(self, name: str) -> bool:
        return name.split(".")[0] in self.list_models()

    def create_model(self, name: str, **arguments: Any) -> nn.Module:
        self.calls.append({"name": name, **arguments})
        if "img_size" in arguments and not name.startswith("vit"):
            raise TypeError("FakeNet.__init__() got an unexpected keyword argument 'img_size'")
        if "wrong" in arguments:
            raise TypeError("got an unexpected keyword argument 'wrong'")
        if arguments["pretrained"]:
            raise ConnectionError("no network")
        return FakeNet(arguments["in_chans"], maps=name == "maps")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeTimm:
    module = FakeTimm()
    monkeypatch.setitem(sys.modules, "timm", module)
    return module


@pytest.mark.parametrize("name", ["resnet18", "maps"])
def test_the_width_is_that_of_the_output(fake: FakeTimm, name: str) -> None:
    net = Timm(name, image_size=16, in_channels=2)
    assert net.num_features == 6
    assert net(torch.randn(3, 2, 16, 16)).shape == (3, 6)
    assert net.training


def test_a_model_for_one_size_is_told_the_image_size_and_others_are_not(fake: FakeTimm) -> None:
    common = {"pretrained": False, "num_classes": 0, "in_chans": 3}
    Timm("vit_tiny_patch16_224", image_size=32)
    assert fake.calls[-1] == {"name": "vit_tiny_patch16_224", "img_size": 32, **common}
    Timm("resnet18", image_size=32)
    assert fake.calls[-1] == {"name": "resnet18", **common}


def test_options_go_to_timm(fake: FakeTimm) -> None:
    Timm("vit_tiny_patch16_224", image_size=32, options={"drop_path_rate": 0.1})
    assert fake.calls[-1]["drop_path_rate"] == 0.1


def test_tags_and_hub_names_are_left_to_timm(fake: FakeTimm) -> None:
    Timm("resnet18.a1_in1k", image_size=32)
    Timm("hf-hub:someone/some_model", image_size=32)
    assert fake.calls[-1]["name"] == "hf-hub:someone/some_model"


def test_an_unknown_name_gets_the_nearest(fake: FakeTimm) -> None:
    with pytest.raises(ValueError, match=r"no model 'resnet_18'; the nearest are: resnet18"):
        Timm("resnet_18", image_size=32)
    with pytest.raises(ValueError, match=r"no model 'qqqq'; timm.list_models\(\) lists all"):
        Timm("qqqq", image_size=32)
    assert fake.calls == []


def test_a_wrong_option_is_reported_with_what_was_asked(fake: FakeTimm) -> None:
    with pytest.raises(ValueError, match=r"cannot build 'vit_tiny_patch16_224' .*'wrong'"):
        Timm("vit_tiny_patch16_224", image_size=32, options={"wrong": 1})


def test_weights_that_cannot_be_had_are_reported(fake: FakeTimm) -> None:
    with pytest.raises(ValueError, match=r"'pretrained': True.*ConnectionError: no network"):
        Timm("vit_tiny_patch16_224", image_size=32, pretrained=True)


def test_a_missing_timm_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=r"pip install timm$"):
        Timm("resnet18", image_size=32)


if REAL:

    @pytest.mark.parametrize(
        ("name", "width"),
        [("resnet10t", 512), ("mobilenetv3_small_050", 1024), ("test_vit", 64), ("test_convnext", 64)],
    )
    def test_real_models_give_features_at_small_sizes(name: str, width: int) -> None:
        net = Timm(name, image_size=32)
        assert net.num_features == width
        net(torch.randn(2, 3, 32, 32)).square().sum().backward()
        assert all(parameter.grad is not None for parameter in net.parameters() if parameter.requires_grad)

    def test_our_vit_loads_into_timms_and_gives_the_same_features() -> None:
        import timm

        from sslcli.backbones.vit import VisionTransformer

        ours = VisionTransformer(image_size=32, patch_size=8, width=24, depth=2, num_heads=3).eval()
        theirs = timm.models.vision_transformer.VisionTransformer(
            img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=0
        ).eval()
        theirs.load_state_dict(ours.state_dict())
        images = torch.randn(2, 3, 32, 32)
        with torch.no_grad():
            torch.testing.assert_close(ours(images), theirs(images))


@pytest.mark.skipif(not REAL, reason="timm is not installed")
@pytest.mark.parametrize("option", ["checkpoint_path", "pretrained_cfg"])
def test_a_file_of_weights_that_holds_code_runs_none(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A damaged file is refused although older versions of timm ask torch to unpickle it without weights_only."""
    path, mark = tmp_path / "net.pth", tmp_path / "ran"
    path.write_bytes(pickle.dumps(Act(str(mark))))
    load = torch.load
    monkeypatch.setattr("torch.load", lambda *args, **given: load(*args, **given | {"weights_only": None}))
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    options = {"checkpoint_path": str(path)} if option == "checkpoint_path" else {option: {"file": str(path)}}
    with pytest.raises(ValueError, match="timm cannot build"):
        Timm("resnet10t", image_size=32, pretrained=option != "checkpoint_path", options=options)
    assert not mark.exists()
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"


class Act:
    """Leaves a mark when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open, (self.path, "w")
