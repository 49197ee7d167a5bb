from __future__ import annotations

import json
import math

import torch

from exported import trained
from sslcli.backbones.wrap import Wrapped
from sslcli.weights.export.target import json_text, not_finite
from tiny import TinyNet, vit


def test_the_names_are_those_of_the_wrapped_network() -> None:
    net = TinyNet()
    one = trained(Wrapped(net, num_features=8), size=8)
    assert one.state.keys() == net.state_dict().keys()


def test_weights_that_are_not_finite_are_named() -> None:
    one = trained(TinyNet(), size=8)
    assert not_finite(one.state) is None
    with torch.no_grad():
        one.net.get_parameter("conv.weight").view(-1)[0] = math.nan
    assert str(not_finite(one.state | {"count": 3})).startswith("1 of 6 tensors are not finite, conv.weight")


def test_states_of_random_numbers_are_no_weights() -> None:
    assert not [name for name in trained(vit(drop_path=0.1), size=8).state if "noise" in name]


def test_json_ends_with_a_newline() -> None:
    assert json_text({"a": 1}).endswith("}\n")
    assert json.loads(json_text({"a": [1]})) == {"a": [1]}
