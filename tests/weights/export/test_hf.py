from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from exported import round_trip, run_usage, trained
from sslcli.backbones.resnet import ResNet
from sslcli.backbones.small import Small
from sslcli.data.crops import to_uint8
from sslcli.weights.export.hf import HuggingFace, resnet_state, vit_state
from tiny import vit

TARGET = HuggingFace()


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({}, "ViTModel"),
        ({"pool": "mean"}, "ViTModel"),
        ({"layer_scale": 0.1}, "Dinov2Model"),
        ({"registers": 3, "pool": "mean"}, "Dinov2WithRegistersModel"),
    ],
)
def test_transformers_computes_the_features_of_a_vit(options: dict[str, object], kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    one = trained(vit(**options), size=8)
    assert round_trip(TARGET, one, tmp_path) < 1e-6
    images = torch.rand(2, 3, 8, 8)
    assert torch.allclose(run_usage(TARGET, one, tmp_path, images), one.net(images), atol=1e-6)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [kind]
    net = transformers.AutoModel.from_pretrained(tmp_path).eval()
    assert type(net).__name__ == kind
    out = net(images)
    assert torch.allclose(out.pooler_output, out.last_hidden_state[:, 0], atol=1e-6)


def test_transformers_computes_the_features_of_a_resnet_and_preprocesses_as_the_evaluation(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    one = trained(ResNet("resnet18", image_size=32, stem="imagenet"), size=32)
    assert round_trip(TARGET, one, tmp_path) < 1e-6
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (72, 54, 3), dtype=np.uint8))
    wide = picture.resize((36, 48), Image.Resampling.BILINEAR).crop((2, 8, 34, 40))
    expected = one.preprocessing.normalize(to_uint8([wide]) / 255)
    found = transformers.AutoImageProcessor.from_pretrained(tmp_path)(picture, return_tensors="pt")["pixel_values"]
    assert (found - expected).abs().max() < 0.03  # the processor resizes tensors, with another rounding than PIL


def test_every_weight_gets_a_name_of_its_own() -> None:
    net = vit(registers=2)
    found = vit_state(net, net.state_dict())
    assert sum(value.numel() for value in net.state_dict().values()) + 16 + 6 * 16 == sum(
        value.numel() for value in found.values()
    )  # a mask token, and LayerScale of ones in three blocks
    state = ResNet("resnet50", image_size=32, stem="imagenet").state_dict()
    names = resnet_state(state)
    assert len(names) == len(state)
    assert names["encoder.stages.1.layers.0.layer.2.normalization.bias"] is state["layer2.0.bn3.bias"]
    assert names["encoder.stages.3.layers.0.shortcut.convolution.weight"] is state["layer4.0.downsample.0.weight"]


def test_what_transformers_does_not_have_is_refused() -> None:
    assert "only the vision" in str(TARGET.obstacle(trained(Small(image_size=16, width=4), size=16)))
    assert "stem" in str(TARGET.obstacle(trained(ResNet("resnet18", image_size=32), size=32)))
    assert "4 channels" in str(TARGET.obstacle(trained(vit(in_channels=4), size=8, channels=4)))
    assert "integer mlp_ratio" in str(TARGET.obstacle(trained(vit(layer_scale=0.1, mlp_ratio=2.5), size=8)))
    with torch.device("meta"):
        wide = ResNet("wide_resnet50_2", image_size=224).eval()
    one = trained(ResNet("resnet18", image_size=32), size=32)
    assert "no wide ResNets" in str(TARGET.obstacle(type(one)(**{**vars(one), "net": wide})))
