"""The contract of a method is declared completely; no member is found by probing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from sslcli.backbones.resnet import ResNet
from sslcli.methods.base import Batch, Method, token_backbone
from tiny import vit

ROOT = Path(__file__).parents[2]
OF_TORCH = set(dir(nn.Module)) | set(nn.Module.__annotations__)
DECLARED = {name for name in (*vars(Method), *Method.__annotations__) if not name.startswith("_")} - OF_TORCH


def test_every_member_of_the_contract_is_documented() -> None:
    page = (ROOT / "docs/add-a-method.md").read_text(encoding="utf-8")
    table = page.partition("## All members")[2].partition("\n## ")[0]
    documented = {name for row in re.findall(r"^\| (`[^|]+) \|", table, re.MULTILINE) for name in names_in(row)}
    assert documented - {"forward", "backbone"} == DECLARED


def names_in(cell: str) -> list[str]:
    """`"`stored()`, `num_views`"` -> `["stored", "num_views"]`."""
    return re.findall(r"`(\w+)", cell)


def test_no_member_of_a_method_is_found_by_probing() -> None:
    probing = re.compile(r"(getattr|hasattr)\((self\.|run\.|job\.|parts\.)?(method|net|protocol)\b")
    found = [
        f"{path.name}: {line.strip()}"
        for path in sorted((ROOT / "sslcli").rglob("*.py"))
        for line in path.read_text(encoding="utf-8").splitlines()
        if probing.search(line)
    ]
    assert found == []


@pytest.mark.parametrize("backbone", [nn.Flatten(), ResNet("resnet18", image_size=8)], ids=["module", "resnet"])
def test_a_backbone_without_patch_tokens_is_refused_for_methods_that_mask_patches(backbone: nn.Module) -> None:
    with pytest.raises(
        ValueError, match=rf"backbone {type(backbone).__name__} has no patch tokens: choose backbone=vit"
    ):
        token_backbone(backbone)


def test_a_vision_transformer_has_patch_tokens() -> None:
    net = vit()
    assert token_backbone(net) is net


def test_what_a_method_leaves_out_means_nothing() -> None:
    method, images = Method(nn.Flatten()), torch.zeros(2, 3, 4, 4)
    assert (method.stored(), method.param_groups(), method.mixture) == (None, None, None)
    assert (method.queue_length, method.num_negatives(8), method.head_layers, method.finetune_layer) == (0, None, 0, 0)
    assert (method.effective(8), method.group_options()) == ({}, {})
    assert method.evaluated_network is method.backbone
    method.before_step(0.5, 3.5)
    assert torch.equal(method.projection(images), method.features(images))
    assert method.pictures(images) == {}
    with pytest.raises(ValueError, match="layer is 1, but Method has no features inside its head"):
        method.head_features(images, 1)
    with pytest.raises(NotImplementedError, match="Method does not define forward"):
        method(Batch([images], torch.arange(2), torch.zeros(2)))
    for act in (lambda: method.embed(Batch([images], torch.arange(2), torch.zeros(2))), lambda: method.compare(())):
        with pytest.raises(NotImplementedError, match="Method does not divide its loss"):
            act()
