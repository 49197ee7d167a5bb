"""Memory bank: rows, updates and losses."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sslcli.methods.bank import DENSE, Bank, log_normalizer, nce, sampled_softmax, scores, write


def units(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(shape, generator=generator, dtype=torch.float64), dim=-1)


def test_scores_are_the_same_by_rows_and_by_matrix_product() -> None:
    v, chosen = units(3, 4), torch.tensor([[2, 5], [5, 5], [0, 1]])
    rows = units(2 * DENSE + 1, 4, seed=1)
    by_rows, by_product = (scores(v, part, chosen, temperature=0.3) for part in (rows, rows[:-1]))
    torch.testing.assert_close(by_rows, by_product)
    torch.testing.assert_close(by_rows, torch.einsum("nd,nkd->nk", v, rows[chosen]) / 0.3)


def test_scores_that_overflow_an_exponential_keep_the_loss_finite() -> None:
    logits = torch.tensor([[1000.0, -1000.0, 1000.0]], requires_grad=True)
    loss = nce(logits, log_z=log_normalizer(logits, 5), num_images=5).mean()
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()


def test_sampled_softmax_is_the_cross_entropy_of_the_own_row() -> None:
    logits = torch.randn(4, 6, dtype=torch.float64)
    expected = -torch.stack([torch.log(row.exp()[0] / row.exp().sum()) for row in logits])
    torch.testing.assert_close(sampled_softmax(logits), expected)


def test_rows_start_uniform_with_a_mean_length_near_one() -> None:
    rows = Bank(5000, 128, momentum=0.5).rows
    bound = math.sqrt(3 / 128)
    assert rows.dtype == torch.float32
    assert 0.99 * bound < float(rows.abs().max()) <= bound
    assert float(rows.mean()) == pytest.approx(0, abs=1e-3)
    assert float(rows.square().sum(1).mean()) == pytest.approx(1, abs=0.01)


def test_an_image_that_comes_more_than_once_counts_with_its_last_embedding() -> None:
    rows, v, index = units(6, 4), units(5, 4, seed=1), torch.tensor([4, 2, 4, 0, 4])
    expected = rows.clone()
    for i, place in ((2, 1), (0, 3), (4, 4)):
        expected[i] = F.normalize(rows[i] + v[place], dim=0)
    write(rows, index, v, momentum=0.5)
    torch.testing.assert_close(rows, expected)


def test_only_present_embeddings_are_written() -> None:
    rows, v, index = units(6, 4), units(5, 4, seed=1), torch.tensor([4, 2, 4, 0, 4])
    present = torch.tensor([True, False, True, True, False])
    expected = rows.clone()
    for i, place in ((0, 3), (4, 2)):
        expected[i] = F.normalize(rows[i] + v[place], dim=0)
    write(rows, index, v, present, momentum=0.5)
    torch.testing.assert_close(rows, expected)
    assert torch.equal(rows[2], expected[2])  # no embedding of this image is present
