"""Tests of scripts/count_communication.py and scripts/step_time.py, and of the counts in docs/scaling.md."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import count_communication
from count_communication import (
    PACKAGE,
    PURPOSES,
    SMALL,
    CollectiveCount,
    CollectiveCounter,
    Traffic,
    check,
    compose_config,
    count_step,
    fit_traffic,
    measure,
    table,
)
from processes import Pair
from sslcli.distributed import collectives
from step_time import Machine, Step, Workload, step

PAGE = Path(count_communication.__file__).parents[1] / "docs" / "scaling.md"


def known_collectives() -> dict[str, CollectiveCount]:
    """Count one collective of each kind with a known number of bytes."""
    rows = torch.zeros(6, 5, requires_grad=True)  # 120 bytes
    with CollectiveCounter() as counter:
        collectives.all_gather_with_grad(rows).sum().backward()
        collectives.exchange(torch.zeros(4, 3, dtype=torch.float64), [2, 2], [2, 2])
        collectives.all_reduce_mean(torch.zeros(7))
        dist.all_reduce(torch.zeros(7), async_op=True).wait()
        collectives.gather_objects("me")
    dist.all_reduce(torch.zeros(7))  # closed: no longer counted
    return counter.counts


def test_known_collectives_are_counted(pair: Pair) -> None:
    for found in pair.run(known_collectives):
        assert found["embeddings"] == CollectiveCount("all-gather", 1, 120)
        assert found["embeddings, gradient"] == CollectiveCount("reduce-scatter", 1, 120)
        assert found["shuffle"] == CollectiveCount("all-to-all", 1, 96)
        reduced = [counted for counted in found.values() if counted.collective == "all-reduce"]
        assert sum(counted.calls for counted in reduced) == 2
        assert sum(counted.sent for counted in reduced) == 2 * 28
        assert found["gather_objects"].calls == 1


def test_every_function_with_a_purpose_exists() -> None:
    for module, name in PURPOSES:
        source = (PACKAGE / f"{module.replace('.', '/')}.py").read_text("utf-8")
        assert f"def {name}(" in source, f"{module} has no function {name}"


def test_formulas_are_derived_from_two_counts_and_give_the_bytes_of_a_ring() -> None:
    few = {"keys": CollectiveCount("all-gather", 3, 100 + 4 * 10), "sums": CollectiveCount("all-reduce", 1, 64)}
    many = {"keys": CollectiveCount("all-gather", 3, 100 + 8 * 10), "sums": CollectiveCount("all-reduce", 1, 64)}
    traffic = fit_traffic(few, many, 4)
    assert traffic["keys"] == Traffic("all-gather", 3, fixed=100, per_image=10)
    assert traffic["keys"].link_bytes(5, 8) == 7 * 150
    assert traffic["sums"].link_bytes(5, 8) == 2 * 7 / 8 * 64
    assert Traffic("all-to-all", 1, 0, 10).link_bytes(4, 8) == 7 / 8 * 40


@pytest.mark.parametrize("name", ["simclr", "moco_v2", "memory_bank"])
def test_the_page_has_the_current_counts(name: str, pair: Pair) -> None:
    """The counts of one of 2 simulated processes are those of 2 real processes and of the page."""
    (case,) = measure({name: SMALL[name]}, num_images=2, simulated=[16], real=[])
    assert "\n".join(table([case]).splitlines()[2:]) in PAGE.read_text()
    for _, counts in pair.run(count_step, compose_config(SMALL[name], 6)):
        check(case.traffic, counts, 3, f"{name} on 2 processes")


def test_counts_that_differ_from_the_formula_raise() -> None:
    traffic = {"keys": Traffic("all-gather", 1, 0, 10)}
    check(traffic, {"keys": CollectiveCount("all-gather", 1, 30)}, 3, "this")
    for wrong in (("all-gather", 1, 31), ("all-gather", 2, 30), ("all-reduce", 1, 30)):
        with pytest.raises(ValueError, match="this: expected"):
            check(traffic, {"keys": CollectiveCount(*wrong)}, 3, "this")


def test_a_ring_of_one_node_takes_latency_and_bytes_over_bandwidth() -> None:
    machine = Machine(nvlink=100.0, link_efficiency=1.0, launch=1.0, latency_in_node=0.5, latency_between_nodes=0.0)
    assert machine.seconds("all-gather", 2, 300.0, 8) == 2 * (1 + 7 * 0.5) + 3
    assert machine.seconds("all-reduce", 1, 300.0, 8) == 1 + 2 * 7 * 0.5 + 3


def test_the_gradient_sum_overlaps_with_the_backward_pass_except_for_the_last_bucket() -> None:
    load = Workload("any", 100.0, 1, 0, 0, 0, 0, 1, 0)
    traffic = {"gradients": Traffic("all-reduce", 9, 100_000_000, 0)}
    slow = Machine(nvlink=1e6, link_efficiency=1.0)  # the sum takes minutes, the network a second
    fast = Machine()
    whole = slow.seconds("all-reduce", 4, traffic["gradients"].link_bytes(100, 8), 8)
    assert math.isclose(step(load, traffic, slow, 100, 8).gradients, whole - 2 / 3)
    whole = fast.seconds("all-reduce", 4, traffic["gradients"].link_bytes(100, 8), 8)
    assert math.isclose(step(load, traffic, fast, 100, 8).gradients, whole / 4)
    assert step(load, traffic, fast, 100, 1) == Step(1.0, 0, 0, 0, 0, 0)
