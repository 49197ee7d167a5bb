"""Comparison of the tensors of a checkpoint with a network."""

from __future__ import annotations

import torch
from torch import nn

from sslcli.backbones.wrap import Wrapped
from sslcli.weights.fitting import names_of, place, places


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))


def test_the_name_of_a_wrapper_is_not_part_of_the_names() -> None:
    net = network()
    assert names_of(Wrapped(net, num_features=4)).keys() == net.state_dict().keys()


def test_missing_unknown_and_differing_tensors_are_listed() -> None:
    own = names_of(network())
    flat = {f"a.{name}": value.clone() for name, value in own.items()} | {"a.fc.weight": torch.zeros(2)}
    assert place(flat, "a.", own).fits
    flat["a.1.more"] = torch.zeros(1)  # beside parameters of the network, so it belongs to a network like this one
    flat["a.0.weight"] = torch.zeros(4, 3, 1, 1)
    del flat["a.1.bias"]
    found = place(flat, "a.", own)
    assert (found.missing, found.unknown) == (["1.bias"], ["a.1.more"])
    assert found.shapes == ["0.weight is (4, 3, 1, 1) and should be (4, 3, 3, 3)"]
    assert not found.fits


def test_a_missing_counter_of_batches_is_zero() -> None:
    own = names_of(network())
    flat = {name: value for name, value in own.items() if not name.endswith("num_batches_tracked")}
    found = place(flat, "", own)
    assert found.fits
    assert found.state["1.num_batches_tracked"] == 0


def test_the_place_with_the_most_names_comes_first() -> None:
    own = names_of(network())
    flat = {"b.0.weight": own["0.weight"]} | {f"a.{name}": value for name, value in own.items()}
    assert [found.prefix for found in places(flat, own)] == ["a.", "b."]
