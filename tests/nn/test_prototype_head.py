from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from golden_cases import Case, golden_cases
from sslcli.nn.prototype_head import PrototypeHead, Prototypes


@golden_cases("dino_head")
def test_head_equals_the_official_one(case: Case) -> None:
    x, params = case.inputs, case.params
    gain = "last_layer.weight_g" in x
    head = PrototypeHead(
        params["in"],
        hidden=params["hidden"],
        dim=params["bottleneck"],
        num_prototypes=params["K"],
        layers=params["layers"],
        norm=params["bn"],
        trained_gain=not params["norm_last_layer"],
    ).to(case.dtype)
    missing, unexpected = head.load_state_dict(
        {name: value for name, value in x.items() if name not in ("x", "coef")}, strict=False
    )
    assert unexpected == []
    assert missing == ([] if gain else ["last_layer.weight_g"])
    features = x["x"].requires_grad_()
    out = head(features)
    loss = (out * x["coef"]).sum()
    loss.backward()
    case.check(out, "out")
    case.check(loss, "loss")
    case.check(features.grad, "grad_x")
    case.check(head.last_layer.weight_v.grad, "grad_weight_v")
    case.check(head.mlp[0].weight.grad, "grad_mlp0")


def test_length_of_the_directions_does_not_matter() -> None:
    layer = Prototypes(4, 6, trained_gain=False)
    z = torch.randn(5, 4)
    before = layer(z)
    with torch.no_grad():
        layer.weight_v.mul_(torch.rand(6, 1) + 1)
    torch.testing.assert_close(layer(z), before)
    torch.testing.assert_close(layer(F.normalize(layer.weight_v, dim=1)).diagonal(), torch.ones(6))


def test_gain_is_trained_only_if_asked_for() -> None:
    assert not Prototypes(4, 6, trained_gain=False).weight_g.requires_grad
    assert Prototypes(4, 6, trained_gain=True).weight_g.requires_grad


def test_layers_and_initialization_are_those_of_the_official_head() -> None:
    head = PrototypeHead(300, hidden=400, dim=8, num_prototypes=5, layers=2, norm=True)
    assert [type(part) for part in head.mlp] == [nn.Linear, nn.BatchNorm1d, nn.GELU, nn.Linear]
    assert abs(float(head.mlp[0].weight.std().detach()) - 0.02) < 0.001
    assert not head.mlp[0].bias.any()
    assert [type(part) for part in PrototypeHead(3, hidden=4, dim=8, num_prototypes=5, layers=1).mlp] == [nn.Linear]
    torch.testing.assert_close(head.bottleneck(torch.randn(3, 300)).norm(dim=1), torch.ones(3))
    # The prototypes have the default initialization of a linear layer: uniform with a variance of 1 / (3 dim).
    prototypes = Prototypes(256, 400, trained_gain=False).weight_v.detach()
    assert abs(float(prototypes.std()) - (3 * 256) ** -0.5) < 0.001
