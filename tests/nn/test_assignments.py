"""The information in assignments to prototypes."""

from __future__ import annotations

import math

import pytest
import torch

from sslcli.nn.assignments import summarize


@pytest.mark.parametrize("row", [torch.eye(6)[2], torch.full((6,), 1 / 6), torch.tensor([0.5, 0.5, 0, 0, 0, 0])])
def test_equal_assignments_have_no_information_be_they_sharp_or_uniform(row: torch.Tensor) -> None:
    assert float(summarize(row.expand(2, 8, 6)).information()) == pytest.approx(0, abs=1e-6)


def test_balanced_sharp_assignments_have_the_logarithm_of_the_number_of_prototypes() -> None:
    assert float(summarize(torch.eye(6).repeat(3, 1)).information()) == pytest.approx(math.log(6))


def test_information_is_the_mean_divergence_from_the_mean_assignment() -> None:
    p = torch.randn(2, 10, 6, dtype=torch.float64).softmax(2).requires_grad_()
    found = summarize(p)
    rows = p.detach().flatten(0, 1)
    divergence = (rows * (rows / rows.mean(0)).log()).sum(1).mean()
    torch.testing.assert_close(found.information(), divergence)
    assert not found.mean.requires_grad
    assert not found.entropy.requires_grad
