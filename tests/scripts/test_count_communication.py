"""scripts/count_communication.py and scripts/step_time.py: what is counted, and what docs/scaling.md says of it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import count_communication
from count_communication import (
    SMALL,
    Count,
    Counted,
    Traffic,
    check,
    composed,
    counted_step,
    measure,
    table,
    traffic_of,
)
from processes import Pair
from sslcli.distributed import collectives
from step_time import Machine, Step, Workload, step

PAGE = Path(count_communication.__file__).parents[1] / "docs" / "scaling.md"


def known_collectives() -> dict[str, Counted]:
    """One of each kind on a known number of bytes."""
    rows = torch.zeros(6, 5, requires_grad=True)  # 120 bytes
    with Count() as count:
        collectives.all_gather_with_grad(rows).sum().backward()
        collectives.exchange(torch.zeros(4, 3, dtype=torch.float64), [2, 2], [2, 2])
        collectives.all_reduce_mean(torch.zeros(7))
        dist.all_reduce(torch.zeros(7), async_op=True).wait()
        collectives.gather_objects("me")
    dist.all_reduce(torch.zeros(7))  # closed: no longer counted
    return count.found


def test_known_collectives_are_counted(pair: Pair) -> None:
    for found in pair.run(known_collectives):
        assert found["embeddings"] == Counted("all-gather", 1, 120)
        assert found["embeddings, gradient"] == Counted("reduce-scatter", 1, 120)
        assert found["shuffle"] == Counted("all-to-all", 1, 96)
        reduced = [counted for counted in found.values() if counted.collective == "all-reduce"]
        assert sum(counted.calls for counted in reduced) == 2
        assert sum(counted.sent for counted in reduced) == 2 * 28
        assert found["gather_objects"].calls == 1


def test_the_law_is_found_from_two_counts_and_gives_the_bytes_of_a_ring() -> None:
    few = {"keys": Counted("all-gather", 3, 100 + 4 * 10), "sums": Counted("all-reduce", 1, 64)}
    many = {"keys": Counted("all-gather", 3, 100 + 8 * 10), "sums": Counted("all-reduce", 1, 64)}
    law = traffic_of(few, many, 4)
    assert law["keys"] == Traffic("all-gather", 3, fixed=100, an_image=10)
    assert law["keys"].through_the_link(5, 8) == 7 * 150
    assert law["sums"].through_the_link(5, 8) == 2 * 7 / 8 * 64
    assert Traffic("all-to-all", 1, 0, 10).through_the_link(4, 8) == 7 / 8 * 40


@pytest.mark.parametrize("name", ["simclr", "moco_v2", "memory_bank"])
def test_the_page_says_what_is_counted_now(name: str, pair: Pair) -> None:
    """Counted as one of 2 pretended processes, and the same in 2 real ones."""
    (counting,) = measure({name: SMALL[name]}, num_images=2, pretend=[16], real=[])
    assert "\n".join(table([counting]).splitlines()[2:]) in PAGE.read_text()
    for _, counted in pair.run(counted_step, composed(SMALL[name], 6)):
        check(counting.traffic, counted, 3, f"{name} on 2 processes")


def test_what_does_not_follow_the_law_is_told() -> None:
    law = {"keys": Traffic("all-gather", 1, 0, 10)}
    check(law, {"keys": Counted("all-gather", 1, 30)}, 3, "this")
    for wrong in (Counted("all-gather", 1, 31), Counted("all-gather", 2, 30), Counted("all-reduce", 1, 30)):
        with pytest.raises(ValueError, match="this: expected"):
            check(law, {"keys": wrong}, 3, "this")


def test_a_ring_of_one_node_takes_latency_and_bytes_over_bandwidth() -> None:
    machine = Machine(nvlink=100.0, reached=1.0, launch=1.0, near=0.5, far=0.0)
    assert machine.seconds("all-gather", 2, 300.0, 8) == 2 * (1 + 7 * 0.5) + 3
    assert machine.seconds("all-reduce", 1, 300.0, 8) == 1 + 2 * 7 * 0.5 + 3


def test_a_sum_hides_behind_the_backward_pass_but_for_its_last_bucket() -> None:
    load = Workload("any", 100.0, 1, 0, 0, 0, 0, 1, 0)
    traffic = {"gradients": Traffic("all-reduce", 9, 100_000_000, 0)}
    slow = Machine(nvlink=1e6, reached=1.0)  # the sum takes minutes, the network a second
    fast = Machine()
    whole = slow.seconds("all-reduce", 4, traffic["gradients"].through_the_link(100, 8), 8)
    assert math.isclose(step(load, traffic, slow, 100, 8).gradients, whole - 2 / 3)
    whole = fast.seconds("all-reduce", 4, traffic["gradients"].through_the_link(100, 8), 8)
    assert math.isclose(step(load, traffic, fast, 100, 8).gradients, whole / 4)
    assert step(load, traffic, fast, 100, 1) == Step(1.0, 0, 0, 0, 0, 0)
