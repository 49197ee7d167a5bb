from __future__ import annotations

import importlib
import inspect
from pathlib import Path

import pytest
import torch
import yaml

import sslcli

FOLDER = Path(sslcli.__file__).parents[1] / "conf" / "backbone"
WIDTHS = {
    "resnet18": 512,
    "resnet34": 512,
    "resnet50": 2048,
    "resnet101": 2048,
    "wide_resnet50_2": 2048,
    "wide_resnet101_2": 2048,
    "small": 256,
    "small_layernorm": 256,
    "dcgan": 512 * 7 * 7,
    "vit_tiny": 192,
    "vit_small": 384,
    "vit_base": 768,
    "timm": None,
}


def test_there_is_a_yaml_for_every_backbone() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(WIDTHS)


@pytest.mark.parametrize("word", WIDTHS)
def test_a_yaml_writes_out_every_keyword_and_builds_what_it_says(word: str) -> None:
    values = yaml.safe_load((FOLDER / f"{word}.yaml").read_text())
    module, name = values.pop("_target_").rsplit(".", 1)
    target = getattr(importlib.import_module(module), name)
    assert set(values) == set(inspect.signature(target).parameters)
    assert values.pop("image_size") == "${dataset.image_size}"
    assert values.pop("in_channels") == "${oc.select:dataset.channels,3}", "datasets without the key have 3 channels"
    if word.startswith("vit"):
        assert values.pop("pool") == "${oc.select:method.backbone_pool,cls}", "methods without the key have cls"
    if WIDTHS[word] is not None:
        with torch.device("meta"):
            assert target(image_size=224, in_channels=3, **values).num_features == WIDTHS[word]
