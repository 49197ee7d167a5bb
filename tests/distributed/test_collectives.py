from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from processes import Pair
from sslcli.distributed import collectives
from sslcli.distributed.batch_shuffle import BatchShuffle
from sslcli.distributed.collectives import all_gather, all_gather_with_grad, all_reduce_mean
from sslcli.nn.batch_norm import SplitBatchNorm, SyncBatchNorm, average_statistics, convert_batch_norm


def my_half(rows: Tensor) -> Tensor:
    """The contiguous part of a global batch that belongs to this process."""
    return rows.chunk(collectives.world_size())[collectives.rank()].clone()


def identity() -> tuple[int, int, bool]:
    return collectives.rank(), collectives.world_size(), collectives.is_main()


def test_processes_know_who_they_are(pair: Pair) -> None:
    assert pair.run(identity) == [(0, 2, True), (1, 2, False)]
    assert identity() == (0, 1, True)


def gathered(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    mine = my_half(rows).requires_grad_()
    return all_gather(mine), all_gather(mine.detach().T.contiguous().T), all_reduce_mean(mine)


def test_gathered_rows_come_in_rank_order_without_gradient(pair: Pair) -> None:
    rows = torch.randn(6, 3)
    for plain, strided, mean in pair.run(gathered, rows):
        assert not plain.requires_grad
        assert torch.equal(plain, rows)
        assert torch.equal(strided, rows)
        torch.testing.assert_close(mean, (rows[:3] + rows[3:]) / 2)


def test_one_process_gathers_its_own_rows() -> None:
    rows = torch.randn(6, 3, requires_grad=True)
    assert torch.equal(all_gather(rows), rows)
    assert not all_gather(rows).requires_grad
    assert all_gather_with_grad(rows) is rows
    assert torch.equal(all_reduce_mean(rows), rows)
    assert all_reduce_mean(rows) is not rows


def pairwise_loss(mine: Tensor, everyone: Tensor) -> Tensor:
    """The mean over own rows of something that couples them to all rows."""
    return torch.logsumexp((mine @ everyone.T).square(), dim=1).mean()


def gradient_of_my_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    mine = my_half(rows).requires_grad_()
    loss = pairwise_loss(mine, all_gather_with_grad(mine))
    loss.backward()
    return loss.detach(), mine.grad / collectives.world_size()  # processes average their gradients


def test_gathering_with_gradient_gives_the_gradient_of_one_process(pair: Pair) -> None:
    rows = torch.randn(6, 3, dtype=torch.float64)
    parts = pair.run(gradient_of_my_rows, rows)
    rows.requires_grad_()
    loss = pairwise_loss(rows, rows)
    loss.backward()
    torch.testing.assert_close((parts[0][0] + parts[1][0]) / 2, loss.detach())
    torch.testing.assert_close(torch.cat([grad for _, grad in parts]), rows.grad, rtol=1e-12, atol=1e-12)


def objects() -> tuple[list[str], list[str | None]]:
    values = ["from 0" if collectives.is_main() else None]
    collectives.broadcast_objects(values)
    collectives.barrier()
    return collectives.gather_objects(f"rank {collectives.rank()}"), values


def test_objects_are_gathered_in_rank_order_and_broadcast_from_the_main_process(pair: Pair) -> None:
    assert pair.run(objects) == [(["rank 0", "rank 1"], ["from 0"])] * 2
    assert objects() == (["rank 0"], ["from 0"])


def shuffled(rows: Tensor, draw: int) -> tuple[Tensor, Tensor]:
    mine = my_half(rows)
    order = BatchShuffle(len(mine), draw, rows.device)
    there = order.shuffle(mine)
    return there, order.restore(there)


def test_shuffling_over_processes_and_back_gives_every_row_to_its_owner(pair: Pair) -> None:
    rows = torch.arange(16.0)[:, None]
    for draw in range(3):
        (there0, back0), (there1, back1) = pair.run(shuffled, rows, draw)
        assert torch.equal(torch.cat([back0, back1]), rows)
        alone, restored = shuffled(rows, draw)
        assert torch.equal(torch.cat([there0, there1]), alone)  # the order is that of one process
        assert torch.equal(restored, rows)
        assert not torch.equal(alone, rows)
        assert set(there0.flatten().tolist()) != set(range(8))  # images change processes


def test_every_draw_is_another_order() -> None:
    rows = torch.arange(32.0)[:, None]
    orders = {tuple(shuffled(rows, draw)[0].flatten().tolist()) for draw in range(20)}
    assert len(orders) == 20


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
