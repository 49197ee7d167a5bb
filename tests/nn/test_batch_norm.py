from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules._functions import SyncBatchNorm as TorchSyncBatchNorm
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

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


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("affine", [True, False])
def test_compiled_code_normalizes_all_groups_at_once(affine: bool, layout: torch.memory_format) -> None:
    norm, images = trained_norm() if affine else nn.BatchNorm2d(5, affine=False), 3 * torch.randn(12, 5, 3, 3) + 5
    results = []
    for compiling in (False, True):
        layer = split(norm, 4)
        views = images.contiguous(memory_format=layout).requires_grad_()
        views.grad = None
        with (
            mock.patch("torch.compiler.is_compiling", lambda compiling=compiling: compiling),
            mock.patch("torch.cat", wraps=torch.cat) as cat,
        ):
            out = layer(views)
        assert cat.called != compiling
        assert out.stride() == views.stride()
        (out * out.sin()).sum().backward()
        results.append([out, views.grad, *(p.grad for p in layer.parameters()), *layer.buffers()])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("num_images", [11, 12])
def test_without_gradients_the_bits_are_the_same(
    num_images: int, affine: bool, dtype: torch.dtype, layout: torch.memory_format
) -> None:
    norm = trained_norm(32) if affine else nn.BatchNorm2d(32, affine=False)
    images = (3 * torch.randn(num_images, 32, 3, 3) + 5).to(dtype, memory_format=layout)
    results = []
    for gradients in (False, True):
        layer = split(norm, 4)
        with torch.set_grad_enabled(gradients), mock.patch("torch.cat", wraps=torch.cat) as cat:
            out = layer(images)
        assert cat.called == gradients
        assert out.stride() == images.stride()
        results.append([out, *layer.buffers()])
    assert [torch.equal(*pair) for pair in zip(*results, strict=True)] == [True] * 4


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


def channels_of(values: Tensor) -> list[int]:
    """The shape that broadcasts a value per channel to `values`."""
    return [1, -1] + [1] * (values.dim() - 2)


def other_axes(values: Tensor) -> list[int]:
    return [axis for axis in range(values.dim()) if axis != 1]


def stats(input: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    variance, mean = torch.var_mean(
        input.to(torch.promote_types(input.dtype, torch.float32)), other_axes(input), correction=0
    )
    return mean, (variance + eps).rsqrt()


def gather_stats(
    input: Tensor,
    means: Tensor,
    inv_stds: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    counts: Tensor,
) -> tuple[Tensor, Tensor]:
    fractions = (counts / counts.sum())[:, None]
    mean = (fractions * means).sum(0)
    variance = (fractions * (inv_stds**-2 - eps + (means - mean) ** 2)).sum(0)
    if running_mean is not None and running_var is not None:
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(variance * counts.sum() / (counts.sum() - 1), momentum)
    return mean, (variance + eps).rsqrt()


def elemt(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, inv_std: Tensor, eps: float
) -> Tensor:
    shape = channels_of(input)
    out = (input - mean.view(shape)) * inv_std.view(shape)
    out = out if weight is None else out * weight.view(shape)
    return (out if bias is None else out + bias.view(shape)).to(input.dtype)


def backward_reduce(
    grad: Tensor,
    input: Tensor,
    mean: Tensor,
    inv_std: Tensor,
    weight: Tensor | None,
    input_g: bool,
    weight_g: bool,
    bias_g: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    centered = input - mean.view(channels_of(input))
    sum_grad = grad.to(mean.dtype).sum(other_axes(grad))
    sum_grad_centered = (grad * centered).sum(other_axes(grad))
    return sum_grad, sum_grad_centered, sum_grad_centered * inv_std, sum_grad.clone()


def backward_elemt(
    grad: Tensor,
    input: Tensor,
    mean: Tensor,
    inv_std: Tensor,
    weight: Tensor | None,
    sum_grad: Tensor,
    sum_grad_centered: Tensor,
    counts: Tensor,
) -> Tensor:
    assert counts.dtype == torch.int32
    shape, count = channels_of(input), counts.sum()
    slope = (input - mean.view(shape)) * (inv_std**2 * sum_grad_centered / count).view(shape)
    scale = inv_std if weight is None else inv_std * weight
    return ((grad - (sum_grad / count).view(shape) - slope) * scale.view(shape)).to(input.dtype)


@contextmanager
def cuda_kernels_on_the_cpu() -> Iterator[None]:
    """Let SyncBatchNorm take its path for CUDA, with kernels that compute on the CPU what torch's CUDA kernels do."""
    kernels = {
        "batch_norm_stats": stats,
        "batch_norm_gather_stats_with_counts": gather_stats,
        "batch_norm_elemt": elemt,
        "batch_norm_backward_reduce": backward_reduce,
        "batch_norm_backward_elemt": backward_elemt,
    }
    with (
        torch.library._scoped_library("aten", "IMPL") as library,
        mock.patch.object(SyncBatchNorm, "_uses_cuda_kernels", lambda self, input: self.momentum is not None),
    ):
        for name, kernel in kernels.items():
            library.impl(name, kernel, "CPU")
        yield


class TorchSync(SyncBatchNorm):
    """The layer with the autograd function of torch.nn.SyncBatchNorm."""

    def forward(self, input: Tensor) -> Tensor:
        world = dist.group.WORLD
        state = (self.running_mean, self.running_var, self.eps, self.momentum, world, dist.get_world_size())
        self.num_batches_tracked.add_(1)
        return TorchSyncBatchNorm.apply(input, self.weight, self.bias, *state)


def normalized(
    norm: nn.Module, images: Tensor, weights: Tensor, kernels: bool = False
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Output and gradient of the images, gradients of parameters, and buffers, after two steps on this process."""
    mine = my_half(images).requires_grad_()
    with cuda_kernels_on_the_cpu() if kernels else nullcontext():
        for _ in range(2):
            mine.grad = None
            norm.zero_grad()
            out = norm(mine)
            assert out.stride() == mine.stride()
            (out * my_half(weights)).sum().backward()
    return torch.stack([out.detach(), mine.grad]), [p.grad for p in norm.parameters()], [*norm.buffers()]


def layer(kind: str, *, bias: bool = True, **settings: Any) -> _BatchNorm:
    """BatchNorm with random weights in float64."""
    norm = getattr(nn, kind)(3, dtype=torch.float64, **settings)
    if not bias:
        norm.register_parameter("bias", None)
    for parameter in norm.parameters():
        parameter.data.add_(torch.randn(3) / 4)
    return norm


LAYERS: dict[str, dict[str, Any]] = {
    "affine": {},
    "scale": {"bias": False},  # the last layer of SimCLR
    "plain": {"affine": False},  # the last layer of MoCo v3
    "cumulative": {"momentum": None},
    "untracked": {"track_running_stats": False},
}


@pytest.mark.parametrize("kernels", [False, True], ids=["any device", "CUDA"])
@pytest.mark.parametrize("kind", ["BatchNorm1d", "BatchNorm2d"])
@pytest.mark.parametrize("settings", LAYERS.values(), ids=LAYERS)
def test_synchronized_batchnorm_is_the_batchnorm_of_the_whole_batch(
    settings: dict[str, Any], kind: str, kernels: bool, pair: Pair
) -> None:
    norm = layer(kind, **settings)
    images, weights = torch.randn(2, 6, 3, *[5, 4][: 2 * (kind == "BatchNorm2d")], dtype=torch.float64)
    images = 3 * images + 5
    if kind == "BatchNorm2d":
        images = images.contiguous(memory_format=torch.channels_last)
    converted = convert_batch_norm(copy.deepcopy(norm), SyncBatchNorm)
    parts = pair.run(normalized, converted, images, weights, kernels)
    out, grads, buffers = normalized(norm, images, weights)
    close = {"rtol": 1e-9, "atol": 1e-10}
    torch.testing.assert_close(torch.cat([part[0] for part in parts], dim=1), out, **close)
    for first, second, expected in zip(parts[0][1], parts[1][1], grads, strict=True):
        torch.testing.assert_close(first + second, expected, **close)  # the training loop sums them over processes
    for first, second, expected in zip(parts[0][2], parts[1][2], buffers, strict=True):
        torch.testing.assert_close(first, expected, **close)
        assert torch.equal(first, second)


def test_cuda_kernels_are_called_as_torch_calls_them(pair: Pair) -> None:
    images, weights = torch.randn(2, 6, 3, 4, 4)
    norm = nn.BatchNorm2d(3)
    ours, torchs = (
        pair.run(normalized, convert_batch_norm(copy.deepcopy(norm), kind), images, weights, True)
        for kind in (SyncBatchNorm, TorchSync)
    )
    torch.testing.assert_close(ours, torchs, rtol=0, atol=0)


class Operations(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.name()] += 1
        return func(*args, **(kwargs or {}))


SYNCHRONIZING = {"aten::nonzero", "aten::index.Tensor", "aten::masked_select", "aten::_local_scalar_dense"}


def operations(kind: type[_BatchNorm], settings: dict[str, Any], kernels: bool) -> Counter[str]:
    norm = convert_batch_norm(nn.BatchNorm2d(3, **settings), kind)
    images = torch.randn(4, 3, 4, 4, requires_grad=True)
    with cuda_kernels_on_the_cpu() if kernels else nullcontext(), Operations() as seen:
        norm(images).square().sum().backward()
    return seen.counts


@pytest.mark.parametrize("kernels", [False, True], ids=["any device", "CUDA"])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_synchronized_batchnorm_never_waits_for_the_device(momentum: float | None, kernels: bool, pair: Pair) -> None:
    for found in pair.run(operations, SyncBatchNorm, {"momentum": momentum}, kernels):
        assert not SYNCHRONIZING & found.keys()
        assert sum(count for name, count in found.items() if "c10d" in name) == 2  # one in each direction
    assert pair.run(operations, TorchSync, {}, True)[0]["aten::index.Tensor"] == 3


@pytest.mark.parametrize("kernels", [False, True], ids=["any device", "CUDA"])
def test_synchronized_batchnorm_of_half_precision_has_statistics_in_full_precision(kernels: bool, pair: Pair) -> None:
    images = (torch.randn(6, 3, 4, 4) + 20).bfloat16()
    norm = nn.BatchNorm2d(3)
    (values, _, buffers), _ = pair.run(
        normalized, convert_batch_norm(copy.deepcopy(norm), SyncBatchNorm), images, torch.ones_like(images), kernels
    )
    _, _, expected = normalized(norm.double(), images.double(), torch.ones_like(images))
    assert values.dtype == torch.bfloat16
    assert buffers[0].dtype == torch.float32
    torch.testing.assert_close(buffers, [e.to(b.dtype) for e, b in zip(expected, buffers, strict=True)])


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
