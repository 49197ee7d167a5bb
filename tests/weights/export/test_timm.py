from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from exported import round_trip, run_usage, trained
from sslcli.backbones.resnet import ResNet
from sslcli.backbones.small import Small
from sslcli.backbones.timm import Timm
from sslcli.data.crops import center_crop, to_uint8
from sslcli.weights.export.timm import TimmFolder
from sslcli.weights.published import find_weights
from tiny import vit

timm = pytest.importorskip("timm")
TARGET = TimmFolder()


@pytest.mark.parametrize(
    "options",
    [{"drop_path": 0.1}, {"pool": "mean"}, {"registers": 3, "layer_scale": 0.1, "pool": "mean"}, {"in_channels": 4}],
)
def test_timm_computes_the_features_of_a_vit(options: dict[str, object], tmp_path: Path) -> None:
    net = vit(**options)
    assert round_trip(TARGET, trained(net, size=8, channels=net.patch_embed.proj.in_channels), tmp_path) < 1e-6
    again, images = vit(**options), torch.rand(2, net.patch_embed.proj.in_channels, 8, 8)
    again.load_state_dict(
        find_weights(load_file(tmp_path / "model.safetensors"), again, prefix=None, where="model").state
    )
    torch.testing.assert_close(again.eval()(images), net.eval()(images), rtol=1e-5, atol=1e-6)


def test_timm_computes_the_features_of_a_resnet_and_preprocesses_as_the_evaluation(tmp_path: Path) -> None:
    one = trained(ResNet("resnet18", image_size=32, stem="imagenet"), size=32)
    assert round_trip(TARGET, one, tmp_path) == 0
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(run_usage(TARGET, one, tmp_path, images), one.net(images))
    net = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(net))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (72, 54, 3), dtype=np.uint8))
    # The transform resizes to 36 x 48 pixels, as does the test transform of sslcli for crops of 32 pixels.
    wide = picture.resize((36, 48), Image.Resampling.BILINEAR).crop((2, 8, 34, 40))
    expected = one.preprocessing.normalize(to_uint8([wide])[0].float()[None] / 255)[0]
    assert torch.allclose(transform(picture), expected, atol=1e-6)
    assert center_crop(picture, 32).size == (32, 32)


@pytest.mark.parametrize("name", ["resnet10t", "test_vit"])
def test_a_model_of_timm_is_exported_under_its_own_name(name: str, tmp_path: Path) -> None:
    net = Timm(name, image_size=32, in_channels=4, options={"drop_path_rate": 0.1})
    assert round_trip(TARGET, trained(net, size=32, channels=4), tmp_path) == 0
    assert json.loads((tmp_path / "config.json").read_text())["architecture"] == name


def test_what_timm_does_not_have_is_refused() -> None:
    assert "stem for small images" in str(TARGET.obstacle(trained(ResNet("resnet18", image_size=32), size=32)))
    assert "only ResNets" in str(TARGET.obstacle(trained(Small(image_size=16, width=4), size=16)))
