from __future__ import annotations

import pytest
import torch
from torch import nn

from sslcli.nn.heads import mlp


def test_head_has_normalized_hidden_layers_and_a_bare_last_one() -> None:
    head = mlp([3, 5, 5, 2])
    kinds = [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
    assert [type(m) for m in head] == kinds
    assert [m.bias for m in head if isinstance(m, nn.Linear)] == [None, None, None]
    assert head(torch.randn(4, 3)).shape == (4, 2)
    assert [type(m) for m in mlp([3, 2], norm=True)] == [nn.Linear]


@pytest.mark.parametrize(
    ("last_norm", "gamma", "beta"), [("affine", True, True), ("scale", True, False), ("plain", False, False)]
)
def test_last_batchnorm_has_the_parameters_it_is_asked_for(last_norm: str, gamma: bool, beta: bool) -> None:
    norm = mlp([3, 2], last_norm=last_norm)[-1]
    assert isinstance(norm, nn.BatchNorm1d)
    assert (norm.weight is not None, norm.bias is not None) == (gamma, beta)


def test_biases_of_hidden_and_last_layer_are_chosen_apart() -> None:
    first, _, last = mlp([3, 4, 2], norm=False, bias=True)
    assert (first.bias is not None, last.bias is not None) == (True, False)
    first, _, last = mlp([3, 4, 2], norm=False, last_bias=True)
    assert (first.bias is not None, last.bias is not None) == (False, True)


def test_impossible_heads_are_refused() -> None:
    with pytest.raises(ValueError, match=r"at least an input and an output width.*\[3\]"):
        mlp([3])
    with pytest.raises(ValueError, match=r"all positive.*\[3, 0\]"):
        mlp([3, 0])
    with pytest.raises(ValueError, match="last_norm is 'batch'"):
        mlp([3, 2], last_norm="batch")
