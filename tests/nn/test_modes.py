from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from sslcli.nn.batch_norm import SplitBatchNorm, SyncBatchNorm, convert_batch_norm
from sslcli.nn.modes import double_precision, evaluating, full_precision, unchanged_statistics, update_statistics
from tiny import TinyNet, copied_state, equal_states


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_full_precision_converts_half_precision_only(dtype: torch.dtype, expected: torch.dtype) -> None:
    assert full_precision(torch.ones(2, dtype=dtype)).dtype == expected


def test_double_precision_is_float32_where_there_is_no_float64() -> None:
    class OnMps(torch.Tensor):
        device = torch.device("mps")  # type: ignore[assignment]

    assert double_precision(torch.ones(2)).dtype == torch.float64
    assert double_precision(torch.ones(2, dtype=torch.bfloat16).as_subclass(OnMps)).dtype == torch.float32


def test_evaluating_restores_the_mode_of_every_submodule() -> None:
    net = nn.Sequential(TinyNet(), nn.Dropout(0.5)).train()
    net[0].norm.eval()
    with evaluating(net):
        assert not any(part.training for part in net.modules())
    assert {name for name, part in net.named_modules() if not part.training} == {"0.norm"}


def test_evaluating_restores_the_modes_after_an_exception() -> None:
    net = TinyNet().train()
    with pytest.raises(RuntimeError, match="out of memory"), evaluating(net):
        raise RuntimeError("out of memory")
    assert net.training
    assert net.norm.training


def test_unchanged_statistics_restores_every_running_statistic() -> None:
    net = nn.Sequential(TinyNet(), nn.BatchNorm1d(8)).train()
    net(torch.randn(4, 3, 8, 8))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with unchanged_statistics(net):
        net(3 + torch.randn(4, 3, 8, 8))
        assert not torch.equal(net[1].running_mean, before["1.running_mean"])
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def diverge(norm: nn.Module) -> None:
    with unchanged_statistics(norm):
        norm(torch.randn(4, 3) + 5)
        raise ValueError("invalid loss")


def test_unchanged_statistics_restores_them_after_an_exception_and_keeps_the_weights_trainable() -> None:
    norm = nn.BatchNorm1d(3)
    with pytest.raises(ValueError, match="invalid loss"):
        diverge(norm)
    assert torch.equal(norm.running_mean, torch.zeros(3))
    assert int(norm.num_batches_tracked) == 0
    assert norm.weight.requires_grad


@pytest.mark.parametrize("kind", [SyncBatchNorm, SplitBatchNorm])
def test_fixed_statistics_are_kept_while_batches_are_normalized_as_before(kind: type[_BatchNorm]) -> None:
    net = nn.Sequential(convert_batch_norm(TinyNet(), kind), nn.BatchNorm1d(8, track_running_stats=False))
    images, start = torch.randn(8, 3, 6, 6), copied_state(net)
    expected = net(images)
    assert not equal_states(net.state_dict(), start)
    net.load_state_dict(start)
    update_statistics(net, enabled=False)
    assert torch.equal(net(images), expected)
    assert equal_states(net.state_dict(), start)
    update_statistics(net, enabled=True)
    net(images)
    assert not equal_states(net.state_dict(), start)
    assert not net[1].track_running_stats
