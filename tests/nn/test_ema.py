from __future__ import annotations

import copy

import torch
from torch import nn

from golden_cases import Case, golden_cases
from sslcli.nn.ema import ema_update, frozen_copy
from tiny import TinyNet


@golden_cases("ema_")
def test_momentum_update_equals_the_official_one_after_every_step(case: Case) -> None:
    x, steps = case.inputs, case.params["steps"]
    names = [name.removeprefix("k0.") for name in x if name.startswith("k0.")]
    target, online = nn.Module(), nn.Module()
    for name in names:
        target.register_parameter(name.replace(".", "_"), nn.Parameter(x[f"k0.{name}"]))
        online.register_parameter(name.replace(".", "_"), nn.Parameter(x[f"q.{name}"][0]))
    after: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    for step in range(steps):
        for name, parameter in zip(names, online.parameters(), strict=True):
            parameter.data.copy_(x[f"q.{name}"][step])
        ema_update(target, online, case.params["momentum"])
        for name, parameter in zip(names, target.parameters(), strict=True):
            after[name].append(parameter.detach().clone())
    for name in names:
        case.check(after[name], f"k.{name}")


def test_momentum_update_leaves_buffers_and_the_online_net_alone() -> None:
    online = TinyNet()
    target = frozen_copy(online)
    with torch.no_grad():
        for tensor in (*online.parameters(), online.norm.running_mean):
            tensor.add_(1.0)
    before = copy.deepcopy(online.state_dict())
    ema_update(target, online, 0.25)
    assert torch.equal(target.norm.running_mean, torch.zeros(8))
    torch.testing.assert_close(target.conv.weight.data, before["conv.weight"] - 0.25)
    assert all(torch.equal(before[name], value) for name, value in online.state_dict().items())


def test_momentum_update_of_a_module_without_parameters_does_nothing() -> None:
    ema_update(nn.ReLU(), nn.ReLU(), 0.9)


def test_frozen_copy_shares_nothing_takes_no_gradient_and_never_drops_activations() -> None:
    class Path(nn.Module):
        drop_prob = 0.3

    online = nn.Sequential(TinyNet(), nn.Dropout(0.5), Path())
    twin = frozen_copy(online).train()
    assert not any(p.requires_grad for p in twin.parameters())
    assert all(p.requires_grad for p in online.parameters())
    own, other = ({t.data_ptr() for t in net.state_dict().values()} for net in (online, twin))
    assert not own & other
    assert (twin[1].p, twin[2].drop_prob) == (0.0, 0.0)
    assert (online[1].p, online[2].drop_prob) == (0.5, 0.3)
    assert twin[0].norm.training
