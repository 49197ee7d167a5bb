"""The backbone that is suggested for a checkpoint."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sslcli.backbones.resnet import ARCHS, ResNet
from sslcli.backbones.small import Small
from sslcli.backbones.vit import VisionTransformer
from sslcli.weights.nearest import VITS, nearest_backbone

CONF = Path(__file__).parents[2] / "conf"


def stored(kind: Any, *args: Any, **options: Any) -> dict[str, Tensor]:
    with torch.device("meta"):
        state = kind(*args, **options).state_dict()
    return {f"module.{name}": value for name, value in state.items()} | {"module.fc.weight": torch.empty(2, 2)}


def test_the_suggestions_are_choices_of_the_configuration() -> None:
    for name in (*ARCHS, *VITS.values(), "small"):
        assert (CONF / f"backbone/{name}.yaml").exists()


@pytest.mark.parametrize(
    ("arch", "stem"), [("resnet18", "cifar"), ("resnet50", "imagenet"), ("wide_resnet50_2", "imagenet")]
)
def test_a_resnet_is_recognized_with_its_stem(arch: str, stem: str) -> None:
    found = nearest_backbone(stored(ResNet, arch, image_size=32, stem=stem))
    assert found is not None
    assert found.endswith(f"backbone={arch} backbone.stem={stem}")


def test_a_vision_transformer_is_recognized_with_its_options() -> None:
    options: dict[str, Any] = {"image_size": 70, "patch_size": 14, "width": 384, "depth": 12, "num_heads": 6}
    found = nearest_backbone(stored(VisionTransformer, **options, registers=4, layer_scale=1e-5))
    assert found is not None
    choice = "backbone=vit_small backbone.patch_size=14 backbone.registers=4 backbone.layer_scale=1e-05"
    assert found.endswith(f"trained at 70 pixels: {choice}")
    found = nearest_backbone(
        stored(VisionTransformer, **options | {"width": 1024, "depth": 24, "num_heads": 16, "mlp_ratio": 2})
    )
    assert found is not None
    assert "backbone=vit_base backbone.patch_size=14 backbone.width=1024 backbone.num_heads=16" in found
    assert found.endswith("backbone.depth=24 backbone.mlp_ratio=2")


def test_a_vision_transformer_without_a_class_token_is_loaded_by_timm() -> None:
    timm = pytest.importorskip("timm")
    options = {"img_size": 32, "patch_size": 8, "class_token": False, "global_pool": "avg", "fc_norm": False}
    net = timm.create_model("vit_tiny_patch16_224", num_classes=0, **options)
    found = nearest_backbone(net.state_dict())
    assert found is not None
    assert "without a class token, as I-JEPA" in found
    name = re.search(r"backbone.name=(\S+)", found)
    assert name is not None
    added = {"class_token": "false", "global_pool": "avg", "fc_norm": "false", "patch_size": 8}
    assert found.endswith(" ".join(f"+backbone.options.{key}={value}" for key, value in added.items()))
    again = timm.create_model(name[1], num_classes=0, **options)
    again.load_state_dict(net.state_dict())


def test_the_small_backbone_is_recognized_and_other_networks_are_not() -> None:
    found = nearest_backbone(stored(Small, image_size=32, width=16))
    assert found == "the file holds the small backbone: backbone=small backbone.width=16"
    assert nearest_backbone({"conv1.weight": torch.zeros(2, 3, 3, 3), "block1.0.weight": torch.zeros(4)}) is None


def test_a_large_number_in_a_key_is_no_depth() -> None:
    shapes = {"patch_embed.proj.weight": (4, 3, 2, 2), "pos_embed": (1, 4, 4), "blocks.0.mlp.fc1.weight": (8, 4)}
    found = nearest_backbone(
        {name: torch.ones(shape) for name, shape in shapes.items()} | {"blocks.9999.a": torch.ones(1)}
    )
    assert found is not None
    assert "depth 2 " in found
