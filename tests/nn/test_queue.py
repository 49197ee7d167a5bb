"""Queues of embeddings: which rows are overwritten."""

from __future__ import annotations

import pytest
import torch

from golden_cases import Case, golden_cases
from sslcli.nn.queue import enqueue, enqueue_all


@golden_cases("moco_queue")
def test_queue_equals_the_official_one_after_every_step(case: Case) -> None:
    queue, head = case.inputs["queue0"].T.contiguous(), torch.tensor(0)
    queues, heads = [], []
    for keys in case.inputs["keys"]:
        enqueue(queue, head, keys)
        queues.append(queue.T.clone())
        heads.append(head.clone())
    case.check(queues, "queue")
    case.check(heads, "ptr")


@pytest.mark.parametrize(("size", "count"), [(10, 4), (10, 10), (10, 23), (7, 7), (1, 3), (5, 1)])
def test_queue_of_any_size_takes_any_number_of_keys_first_in_first_out(size: int, count: int) -> None:
    queue, head = torch.full((size, 2), -1.0), torch.tensor(0)
    newest: list[float] = [-1.0] * size
    for step in range(7):
        keys = torch.arange(step * count, (step + 1) * count).float()
        enqueue(queue, head, keys[:, None].expand(-1, 2))
        newest = [*newest, *keys.tolist()][-size:]
        assert int(head) == (step + 1) * count % size
        assert queue.roll(-int(head), 0)[:, 0].tolist() == newest


def test_the_keys_of_all_micro_batches_are_enqueued_once() -> None:
    keys = torch.arange(12.0).view(6, 2)
    queue, head, parts = torch.zeros(8, 2), torch.tensor(0), list(keys.split(4))
    enqueue_all(queue, head, parts)
    assert torch.equal(queue[:6], keys)
    assert (int(head), parts) == (6, [])
