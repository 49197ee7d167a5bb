from __future__ import annotations

import torch
from torch import Tensor

from processes import Pair, my_half
from sslcli.distributed import collectives
from sslcli.distributed.collectives import all_gather, all_gather_with_grad, all_reduce_mean


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
    """Return the mean over local rows of a function that couples each row to all rows."""
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
