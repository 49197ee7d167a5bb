"""The order of an epoch of a set of shards. That of other sets is tested with the loader."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sslcli.data.order import Layout, last_read_mask, layout_of, shard_order


def shards_of(*sizes: int) -> Tensor:
    """The shard of each image."""
    return torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))


def layout(*sizes: int, lanes: int = 4, buffer: int = 40) -> Layout:
    shard = shards_of(*sizes)
    return layout_of(shard, torch.arange(len(shard)) // 1, lanes=lanes, buffer=buffer)


@pytest.mark.parametrize("batch_size", [1, 3, 8, 24, 240])
@pytest.mark.parametrize("lanes", [1, 4, 7])
def test_an_epoch_shows_every_image_once(batch_size: int, lanes: int) -> None:
    plan = layout(60, 1, 100, 79, lanes=lanes)
    first, second = (shard_order(plan, seed=3, epoch=epoch, batch_size=batch_size) for epoch in (0, 1))
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(240))
    assert not torch.equal(first, second)
    assert torch.equal(first, shard_order(plan, seed=3, epoch=0, batch_size=batch_size))
    assert not torch.equal(first, shard_order(plan, seed=4, epoch=0, batch_size=batch_size))


def test_those_that_do_not_fill_a_batch_are_left_out_and_differ_from_epoch_to_epoch() -> None:
    plan, left_out = layout(50, 53), set()
    for epoch in range(40):
        order = shard_order(plan, seed=0, epoch=epoch, batch_size=20)
        assert len(order) == len(set(order.tolist())) == 100
        left_out |= set(range(103)) - set(order.tolist())
    assert len(left_out) > 50


def test_a_batch_takes_as_many_images_of_each_lane_side_by_side() -> None:
    plan = layout(*[16] * 32, lanes=4, buffer=1)
    batches = shard_order(plan, seed=0, epoch=0, batch_size=32).view(-1, 32)
    lanes = [set(plan.segment[batches[:, 8 * lane : 8 * lane + 8]].flatten().tolist()) for lane in range(4)]
    assert [len(lane) for lane in lanes] == [8] * 4
    assert len(set.union(*lanes)) == 32


def test_shards_are_read_in_another_order_each_epoch() -> None:
    plan = layout(*[10] * 40, lanes=1, buffer=1)
    orders = [plan.segment[shard_order(plan, seed=0, epoch=epoch, batch_size=10)[::10]] for epoch in (0, 1)]
    assert sorted(orders[0].tolist()) == sorted(orders[1].tolist()) == list(range(40))
    assert (orders[0] == orders[1]).sum() < 10


def test_without_a_buffer_a_shard_is_read_in_its_own_order() -> None:
    plan = layout(*[10] * 40, lanes=1, buffer=1)
    order = shard_order(plan, seed=0, epoch=0, batch_size=20)
    assert torch.equal(order.view(40, 10) - order.view(40, 10)[:, :1], torch.arange(10).expand(40, 10))


def test_the_buffer_holds_what_it_may_and_shuffles_well() -> None:
    buffer = 64
    plan = layout(*[100] * 40, lanes=1, buffer=buffer)
    order = shard_order(plan, seed=0, epoch=0, batch_size=100)
    read = shard_order(layout(*[100] * 40, lanes=1, buffer=1), seed=0, epoch=0, batch_size=100)
    place = torch.empty(4000, dtype=torch.long)
    place[read] = torch.arange(4000)
    number = place[order]  # of the reading order, in the order of coming out
    # Whatever came out, no more than the buffer had to be read on.
    ahead = number.cummax(0).values + 1 - torch.arange(1, 4001)
    assert 0.3 * buffer < ahead[100:3900].float().mean() < buffer
    assert ahead.max() <= buffer
    shift = (torch.arange(4000) - number).float()
    assert shift.abs().max() <= buffer
    assert abs(shift.mean()) < 1
    assert 0.25 * buffer < shift.std() < 0.33 * buffer  # of a uniform delay: 0.29


def test_the_buffer_shuffles_in_another_way_each_epoch() -> None:
    zeros = torch.zeros(64, dtype=torch.long)
    plan = Layout(zeros, zeros, lanes=1, buffer=64)
    first, second = (shard_order(plan, seed=0, epoch=epoch, batch_size=8) for epoch in (0, 1))
    assert (first == second).sum() < 16
    assert (first == torch.arange(64)).sum() < 16


def test_a_few_large_shards_are_cut_where_chunks_meet() -> None:
    shard, chunk = shards_of(1000, 20), torch.arange(1020) // 10
    plan = layout_of(shard, chunk, lanes=2, buffer=1)
    sizes = torch.bincount(plan.segment)
    assert 16 <= len(sizes) <= 20
    assert sizes.max() <= 1020 // 16 + 10
    assert sizes[-1] == 20
    assert all(len(set(plan.segment[chunk == c].tolist())) == 1 for c in range(102))
    assert torch.equal(plan.segment, plan.segment.sort().values)
    assert plan.segment.unique().tolist() == list(range(len(sizes)))


def test_many_shards_are_left_whole() -> None:
    assert torch.equal(layout(*[10] * 80).segment, shards_of(*[10] * 80))


def test_the_last_reads_of_a_chunk_are_told_for_each_reader() -> None:
    generator = torch.Generator().manual_seed(0)
    chunk, reader = (torch.randint(0, most, (200,), generator=generator) for most in (9, 3))
    pairs = list(zip(chunk.tolist(), reader.tolist(), strict=True))
    assert last_read_mask(chunk, reader).tolist() == [pair not in pairs[at + 1 :] for at, pair in enumerate(pairs)]
