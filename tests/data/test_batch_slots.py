"""Batches in slots of shared memory, alone and through data workers."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from platforms import needs_linux
from sslcli.data.batch_slots import BatchSlots, PackedBatch, pack
from sslcli.data.num_workers import BatchMemory
from sslcli.data.sources.base import Source
from sslcli.data.workers import iterate_batches

LARGE = 200_000  # values; a tensor that is not copied out of its slot


def batch() -> dict[str, Any]:
    images = torch.arange(4 * 40 * 50 * 30, dtype=torch.int32).to(torch.uint8).view(4, 40, 50, 30).permute(0, 3, 1, 2)
    return {"images": [images, torch.rand(300, 200)[:, ::2]], "index": torch.arange(4), "empty": torch.empty(0, 3)}


def test_a_batch_is_equal_after_packing() -> None:
    slots, whole = BatchSlots(2, 1_000_000), batch()
    slot = slots.take()
    assert slot is not None
    packed = pickle.loads(pickle.dumps(pack(whole, slots, slot)))
    assert isinstance(packed, PackedBatch)
    found = packed.unpack()
    assert found.keys() == whole.keys()
    for one, other in zip([*found["images"], found["index"]], [*whole["images"], whole["index"]], strict=True):
        assert torch.equal(one, other)
        assert one.dtype == other.dtype
    assert found["images"][0].is_contiguous(memory_format=torch.channels_last)
    assert found["empty"].shape == (0, 3)


def test_a_slot_is_free_again_when_no_large_tensor_is_left() -> None:
    slots = BatchSlots(1, 1_000_000)
    slot = slots.take()
    assert slot == 0
    assert slots.take() is None
    found = pack(batch(), slots, slot).unpack()
    index, part = found["index"], found["images"][0][1:]
    del found
    assert slots.take() is None
    del part
    assert slots.take() == 0
    assert index.tolist() == [0, 1, 2, 3]  # small tensors are copies


def test_the_slot_of_a_batch_that_is_too_large_becomes_free(monkeypatch: pytest.MonkeyPatch) -> None:
    slots, whole = BatchSlots(1, 1000), batch()
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor, device=None: tensor + 1)
    for pinned in (False, True):
        slot = slots.take()
        assert slot == 0
        packed = pickle.loads(pickle.dumps(pack(whole, slots, slot)))
        found = packed.pin_memory("cuda").unpack() if pinned else packed.unpack()
        assert torch.equal(found["images"][0], whole["images"][0] + pinned)
    assert slots.take() == 0


def test_pinned_memory_is_copied_out_of_the_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[int] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(tensor.nbytes)
        return tensor.clone()

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    slots, whole = BatchSlots(1, 10_000_000), batch()
    slot = slots.take()
    assert slot is not None
    packed = pack(whole, slots, slot).pin_memory("cuda")
    assert slots.take() == 0  # the slot is free before the batch is used
    assert torch.equal(packed.unpack()["images"][0], whole["images"][0])
    assert pinned[0] < 500_000  # not the whole slot


class Numbers(Dataset[torch.Tensor]):
    def __getitem__(self, item: int) -> torch.Tensor:
        return torch.full((LARGE,), item, dtype=torch.uint8)


def used_shared_memory() -> int:
    state = os.statvfs("/dev/shm")
    return (state.f_blocks - state.f_bavail) * state.f_frsize


@needs_linux
@pytest.mark.parametrize("keep", [True, False])
def test_batches_of_workers_do_not_use_dev_shm_unless_callers_keep_them(
    keep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A caller that keeps all batches gets unchanged values: without a free slot, torch passes the batch."""
    shared: list[bool] = []
    unpack: Callable[[PackedBatch], Any] = PackedBatch.unpack
    monkeypatch.setattr(PackedBatch, "unpack", lambda self: (shared.append(True), unpack(self))[1])
    kept = []
    for number, values in enumerate(
        iterate_batches(Numbers(), range(40), 2, owner=Source, timeout=60, memory=BatchMemory(1, LARGE))
    ):
        assert values.unique().tolist() == [number]
        if keep:
            kept.append(values)
    assert len(shared) == (BatchMemory(1, LARGE).num_slots(2) if keep else 40)
    assert [int(values[0]) for values in kept] == (list(range(40)) if keep else [])
