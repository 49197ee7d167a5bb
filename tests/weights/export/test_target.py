from __future__ import annotations

import json
import math

import pytest
import torch

from exported import trained
from sslcli.backbones.wrap import Wrapped
from sslcli.errors import ConfigError
from sslcli.weights.export.target import check_finite, json_text
from tiny import TinyNet


def test_the_names_are_those_of_the_wrapped_network() -> None:
    net = TinyNet()
    one = trained(Wrapped(net, num_features=8), size=8)
    assert one.state.keys() == net.state_dict().keys()


def test_weights_that_are_not_finite_are_refused() -> None:
    one = trained(TinyNet(), size=8)
    check_finite(one)
    with torch.no_grad():
        one.net.get_parameter("conv.weight").view(-1)[0] = math.nan
    with pytest.raises(ConfigError, match=r"1 of .* tensors are not finite, conv.weight"):
        check_finite(one)


def test_json_ends_with_a_newline() -> None:
    assert json_text({"a": 1}).endswith("}\n")
    assert json.loads(json_text({"a": [1]})) == {"a": [1]}
