"""Sinkhorn-Knopp assignments."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from golden_cases import Case, golden_cases
from processes import Pair
from sslcli.distributed import collectives
from sslcli.nn.sinkhorn import sinkhorn


def reference(logits: Tensor, temperature: float, iterations: int) -> Tensor:
    """The same in float64, in the linear domain, as the official code is written."""
    q = torch.exp(logits.double() / temperature)
    for _ in range(iterations):
        q = q / q.sum(0, keepdim=True)
        q = q / q.sum(1, keepdim=True)
    return q


def cosines(num_images: int = 64, prototypes: int = 40, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(num_images, prototypes, generator=generator) * 2 - 1


@golden_cases("swav_a")
def test_assignments_equal_those_of_swav(case: Case) -> None:
    params = case.params
    options = {"temperature": params["epsilon"], "iterations": params["sinkhorn_iterations"]}
    case.check([sinkhorn(scores, **options) for scores in case.inputs["scores_high"]], "q")


@golden_cases("swav_queue")
def test_assignments_with_a_queue_equal_those_of_swav(case: Case) -> None:
    params, x = case.params, case.inputs
    options = {"temperature": params["epsilon"], "iterations": params["sinkhorn_iterations"]}
    scores = torch.cat([x["scores_high"], x["scores_queue"]], dim=1)
    case.check([sinkhorn(rows, **options)[: params["N"]] for rows in scores], "q")


@golden_cases("dinov2_sinkhorn")
def test_assignments_equal_those_of_dinov2(case: Case) -> None:
    q = sinkhorn(case.inputs["teacher"], temperature=case.params["teacher_temp"], iterations=case.params["iterations"])
    case.check(q, "q")
    case.check(q, "q_patch")


@pytest.mark.parametrize("seed", range(4))
def test_single_precision_agrees_with_double_at_a_low_temperature(seed: int) -> None:
    logits = cosines(seed=seed)
    q = sinkhorn(logits, temperature=0.04, iterations=3)
    assert q.dtype == torch.float32
    torch.testing.assert_close(q.double(), reference(logits, 0.04, 3), rtol=0, atol=1e-6)


def test_rows_sum_to_one_and_after_many_iterations_all_prototypes_are_used_equally() -> None:
    logits = cosines()
    few, many = (sinkhorn(logits, temperature=0.05, iterations=count) for count in (3, 50))
    for q in (few, many):
        torch.testing.assert_close(q.sum(1), torch.ones(64))
    torch.testing.assert_close(many.sum(0), torch.full((40,), 64 / 40), rtol=0.01, atol=0)
    assert (few.sum(0) - 64 / 40).abs().max() > 0.01 * 64 / 40


def test_equal_scores_give_equal_assignments() -> None:
    torch.testing.assert_close(sinkhorn(torch.zeros(3, 5), temperature=0.05), torch.full((3, 5), 0.2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_large_scores_do_not_overflow(dtype: torch.dtype) -> None:
    q = sinkhorn((cosines() * 100).to(dtype), temperature=0.04)
    assert q.isfinite().all()
    torch.testing.assert_close(q.sum(1), torch.ones(64))


def test_rows_that_do_not_count_change_no_other_row() -> None:
    logits = cosines()
    counted = torch.arange(64) % 3 == 0
    q = sinkhorn(logits, temperature=0.05, counted=counted)
    torch.testing.assert_close(q[counted], sinkhorn(logits[counted], temperature=0.05))


def test_assignments_are_finite_if_no_row_counts() -> None:
    assert sinkhorn(cosines(), temperature=0.05, counted=torch.zeros(64, dtype=torch.bool)).isfinite().all()


def test_assignments_carry_no_gradient() -> None:
    assert not sinkhorn(cosines().requires_grad_(), temperature=0.05).requires_grad


def part(logits: Tensor, sizes: list[int]) -> Tensor:
    return sinkhorn(logits.split(sizes)[collectives.rank()], temperature=0.05)


@pytest.mark.parametrize("sizes", [[32, 32], [60, 4], [64, 0]])
def test_two_processes_assign_like_one(sizes: list[int], pair: Pair) -> None:
    logits = cosines()
    together = torch.cat(pair.run(part, logits, sizes))
    torch.testing.assert_close(together, sinkhorn(logits, temperature=0.05), rtol=1e-5, atol=1e-7)
    double = torch.cat(pair.run(part, logits.double(), sizes))
    torch.testing.assert_close(double, reference(logits, 0.05, 3), rtol=1e-12, atol=0)
