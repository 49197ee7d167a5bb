from __future__ import annotations

import torch
from torch import Tensor

from processes import Pair, my_half
from sslcli.distributed.batch_shuffle import BatchShuffle


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


def test_channels_last_images_stay_channels_last(pair: Pair) -> None:
    images = torch.arange(16.0 * 3 * 4 * 5).view(16, 3, 4, 5)
    expected = pair.run(shuffled, images, 1)
    found = pair.run(shuffled, images.contiguous(memory_format=torch.channels_last), 1)
    for one, other in zip(found, expected, strict=True):
        for part, whole in zip(one, other, strict=True):
            assert torch.equal(part, whole)
            assert part.is_contiguous(memory_format=torch.channels_last)
            assert whole.is_contiguous()
