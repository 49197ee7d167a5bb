"""Pretrained weights of timm models, without the network."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sslcli.errors import ConfigError
from sslcli.weights.timm_weights import timm_weights


def test_the_weights_are_those_of_the_model_without_classifier(monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")
    net = timm.create_model("resnet10t", num_classes=0)
    asked: list[tuple[str, dict[str, Any]]] = []

    def pretrained(name: str, **options: Any) -> torch.nn.Module:
        asked.append((name, options))
        return net  # type: ignore[no-any-return]

    monkeypatch.setattr(timm, "create_model", pretrained)
    found = timm_weights("resnet10t.a")
    assert asked == [("resnet10t.a", {"pretrained": True, "num_classes": 0})]
    assert found.state.keys() == net.state_dict().keys()
    assert list(found.mean or ()) == [0.485, 0.456, 0.406]
    net.conv1[0].weight.data += 1
    assert timm_weights("resnet10t.a").digest != found.digest


def test_weights_that_cannot_be_loaded_are_refused_with_the_reason() -> None:
    pytest.importorskip("timm")
    with pytest.raises(ConfigError, match=r"timm:nonesuch cannot be loaded.*timm.list_pretrained\(\)"):
        timm_weights("nonesuch")
