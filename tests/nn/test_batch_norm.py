from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from processes import Pair, my_half
from sslcli.nn.batch_norm import SplitBatchNorm, SyncBatchNorm, average_statistics, convert_batch_norm
from tiny import TinyNet

STATE = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


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


def normalized(norm: nn.Module, images: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
    """Output, gradients and statistics of two steps on this process's part of the images."""
    mine = my_half(images).requires_grad_()
    for _ in range(2):
        mine.grad = None
        norm.zero_grad()
        out = norm(mine)
        (out * my_half(weights)).sum().backward()
    grads = [mine.grad, *(p.grad for p in norm.parameters())]
    return out.detach(), *grads, norm.running_mean, norm.running_var, norm.num_batches_tracked


def last_norms() -> list[nn.Module]:
    """With gamma and beta, with gamma alone (SimCLR's last), with neither (MoCo v3's last)."""
    scale = nn.BatchNorm2d(3)
    scale.register_parameter("bias", None)
    norms = [nn.BatchNorm2d(3), scale, nn.BatchNorm2d(3, affine=False)]
    for parameter in (p for norm in norms for p in norm.parameters()):
        parameter.data.add_(torch.randn(3) / 4)
    return norms


@pytest.mark.parametrize("which", [0, 1, 2], ids=["affine", "scale", "plain"])
def test_synchronized_batchnorm_is_the_batchnorm_of_the_whole_batch(which: int, pair: Pair) -> None:
    norm = last_norms()[which]
    images, weights = 3 * torch.randn(6, 3, 4, 4) + 5, torch.randn(6, 3, 4, 4)
    converted = convert_batch_norm(copy.deepcopy(norm), SyncBatchNorm)
    parts = pair.run(normalized, converted, images, weights)
    out, grad_input, *rest = normalized(norm, images, weights)
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(torch.cat([part[0] for part in parts]), out, **close)
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), grad_input, **close)
    num_parameters = len(list(norm.parameters()))
    for first, second, expected in zip(parts[0][2:], parts[1][2:], rest, strict=True):
        if num_parameters > 0:  # gradients of parameters are those of the own rows, and summed by the loop
            torch.testing.assert_close(first + second, expected, **close)
            num_parameters -= 1
        else:
            torch.testing.assert_close(first, expected, **close)
            assert torch.equal(first, second)


def sync_in_double(norm: nn.Module, images: Tensor) -> Tensor:
    return norm(my_half(images))


def test_synchronized_batchnorm_keeps_double_precision(pair: Pair) -> None:
    norm, images = nn.BatchNorm1d(3).double(), torch.randn(6, 3, dtype=torch.float64)
    converted = convert_batch_norm(copy.deepcopy(norm), SyncBatchNorm)
    parts = pair.run(sync_in_double, converted, images)
    torch.testing.assert_close(torch.cat([part.detach() for part in parts]), norm(images).detach(), rtol=0, atol=1e-12)


def split_statistics(norm: nn.Module, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    mine = my_half(images)
    out = norm(mine)
    average_statistics(norm)
    return out.detach(), norm.running_mean, norm.running_var


def test_split_batchnorm_on_two_processes_is_that_of_one_with_twice_the_groups(pair: Pair) -> None:
    norm = convert_batch_norm(nn.BatchNorm2d(3), SplitBatchNorm)
    norm.group = 4
    images = torch.randn(16, 3, 4, 4) * torch.arange(1, 17).view(-1, 1, 1, 1)
    parts = pair.run(split_statistics, norm, images)
    out, mean, variance = split_statistics(norm, images)
    torch.testing.assert_close(torch.cat([part[0] for part in parts]), out)
    for part in parts:
        torch.testing.assert_close(part[1], mean)
        torch.testing.assert_close(part[2], variance)
