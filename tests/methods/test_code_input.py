"""Input of the linear layer that computes a code."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sslcli.backbones.small import Small
from sslcli.methods.code_input import check_code_from, code_input, code_input_width


def test_the_features_are_the_mean_of_the_map_over_positions() -> None:
    torch.manual_seed(0)
    net = Small(width=4, image_size=32).eval()
    images = torch.rand(3, 3, 32, 32)
    features, values = (code_input(net, code_from, images) for code_from in ("features", "map"))
    for code_from, found in (("features", features), ("map", values)):
        assert found.shape == (3, code_input_width(net, code_from, image_size=32, channels=3))
    assert values.shape[1] > features.shape[1]
    torch.testing.assert_close(values.unflatten(1, (features.shape[1], -1)).mean(2), features)


def test_other_sources_and_backbones_without_maps_are_refused() -> None:
    with pytest.raises(ValueError, match="code_from is 'maps', but it must be one of features, map"):
        check_code_from("maps")
    with pytest.raises(ValueError, match="has no stages"):
        code_input_width(nn.Flatten(), "map", image_size=8, channels=3)
