from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from golden_cases import Case, golden_cases
from sslcli.nn.batch_norm import SplitBatchNorm, SyncBatchNorm, average_statistics, convert_batch_norm
from sslcli.nn.ema import ema_update, frozen_copy
from sslcli.nn.heads import mlp
from tiny import TinyNet

STATE = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


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


def trained_norm(width: int = 5) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(width)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.add_(torch.randn(width) / 4)
    return norm


def split(norm: nn.BatchNorm2d, group: int) -> SplitBatchNorm:
    converted = convert_batch_norm(copy.deepcopy(norm), SplitBatchNorm)
    converted.group = group
    return converted


@pytest.mark.parametrize(("num_images", "group", "sizes"), [(12, 4, [4, 4, 4]), (12, 6, [6, 6]), (11, 4, [4, 4, 3])])
def test_split_batchnorm_is_a_batchnorm_for_each_group(num_images: int, group: int, sizes: list[int]) -> None:
    norm, images = trained_norm(), torch.randn(num_images, 5, 3, 3)
    divided = split(norm, group)
    inputs = [images.clone().requires_grad_() for _ in range(2)]
    twins = [copy.deepcopy(norm) for _ in sizes]
    expected = torch.cat([twin(part) for twin, part in zip(twins, inputs[1].split(sizes), strict=True)])
    found = divided(inputs[0])
    torch.testing.assert_close(found, expected)
    for out in (found, expected):
        out.square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    torch.testing.assert_close(divided.weight.grad, sum(twin.weight.grad for twin in twins))
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(divided, name), sum(getattr(t, name) for t in twins) / len(twins))
    assert int(divided.num_batches_tracked) == 1


def test_split_batchnorm_of_one_process_never_sees_its_batch_as_one_group() -> None:
    images = torch.randn(8, 5, 3, 3)
    assert split(trained_norm(), 64).num_groups(8) == 2
    torch.testing.assert_close(
        split(trained_norm(), 64)(images)[:4].mean((0, 2, 3)), trained_norm().bias, atol=1, rtol=0
    )
    halves = split(nn.BatchNorm2d(5), 64)(images).split(4)
    for half in halves:
        torch.testing.assert_close(half.mean((0, 2, 3)), torch.zeros(5), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", [SplitBatchNorm, SyncBatchNorm])
def test_evaluation_uses_the_running_statistics(kind: type[_BatchNorm]) -> None:
    norm, images = trained_norm(), torch.randn(8, 5, 3, 3)
    norm(images)
    converted = convert_batch_norm(copy.deepcopy(norm), kind).eval()
    assert torch.equal(converted(images), norm.eval()(images))
    assert int(converted.num_batches_tracked) == 1


def test_synchronized_batchnorm_of_one_process_is_batchnorm() -> None:
    norm, images = trained_norm(), torch.randn(8, 5, 3, 3)
    converted = convert_batch_norm(copy.deepcopy(norm), SyncBatchNorm)
    assert torch.equal(converted(images), norm(images))
    for name in STATE:
        assert torch.equal(getattr(converted, name), getattr(norm, name))


@pytest.mark.parametrize("kind", [SplitBatchNorm, SyncBatchNorm])
def test_conversion_reaches_every_batchnorm_and_keeps_the_state_and_its_names(kind: type[_BatchNorm]) -> None:
    net = nn.Sequential(TinyNet(), nn.Sequential(nn.BatchNorm1d(8)), nn.LayerNorm(8))
    state = {name: value.clone() for name, value in net.state_dict().items()}
    assert convert_batch_norm(net, kind) is net
    assert type(net[0].norm) is kind
    assert type(net[1][0]) is kind
    assert type(net[2]) is nn.LayerNorm
    assert all(torch.equal(state[name], value) for name, value in net.state_dict().items())
    assert net.state_dict().keys() == state.keys()
    copy.deepcopy(net)(torch.randn(4, 3, 8, 8))


def test_averaging_statistics_of_one_process_changes_nothing() -> None:
    divided = split(trained_norm(), 4)
    divided(torch.randn(8, 5, 3, 3))
    mean = divided.running_mean.clone()
    average_statistics(divided)
    assert torch.equal(divided.running_mean, mean)
