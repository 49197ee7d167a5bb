"""Context networks of CPC: receptive fields and shapes."""

from __future__ import annotations

import pytest
import torch

from sslcli.methods.cpc_context import CONTEXTS, context_network

DIRECTIONS = range(4)


@pytest.mark.parametrize("name", CONTEXTS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_context_depends_on_the_rows_down_to_its_own_and_on_no_other(name: str, direction: int) -> None:
    torch.manual_seed(0)
    grid = 5
    network = context_network(name, 6, 8).double()
    z = torch.randn(1, 6, grid, grid, dtype=torch.float64, requires_grad=True)
    context = network(torch.rot90(z, -direction, (2, 3)))
    assert context.shape == (1, network.out_channels, grid, grid)
    for row in range(grid):
        (gradient,) = torch.autograd.grad(context[:, :, row].sum(), z, retain_graph=True)
        seen = torch.rot90(gradient, -direction, (2, 3)).abs().sum((0, 1, 3)) > 0
        assert not seen[row + 1 :].any(), (row, seen)
        assert seen[row], (row, seen)
        assert seen[max(0, row - 1) : row + 1].all(), (row, seen)


@pytest.mark.parametrize("name", CONTEXTS)
def test_changing_rows_below_leaves_contexts_above_as_they_were_bit_for_bit(name: str) -> None:
    torch.manual_seed(0)
    network = context_network(name, 6, 8)
    z = torch.randn(2, 6, 5, 5)
    other = z.clone()
    other[:, :, 3:] = torch.randn(2, 6, 2, 5)
    before, after = network(z), network(other)
    assert torch.equal(before[:, :, :3], after[:, :, :3])
    assert not torch.equal(before[:, :, 3:], after[:, :, 3:])


@pytest.mark.parametrize("name", ["pixelcnn_gated", "pixelcnn_v2"])
def test_a_pixelcnn_sees_its_row_to_the_left_and_to_the_right(name: str) -> None:
    torch.manual_seed(0)
    z = torch.randn(1, 6, 5, 5, requires_grad=True)
    context_network(name, 6, 8)(z)[:, :, 2, 2].sum().backward()
    assert z.grad is not None
    assert (z.grad[0, :, 2].abs().sum(0) > 0).all()


def test_a_gru_reads_each_column_by_itself() -> None:
    z = torch.randn(1, 6, 5, 5, requires_grad=True)
    context_network("gru", 6, 8)(z)[:, :, 4, 2].sum().backward()
    assert z.grad is not None
    seen = z.grad[0].abs().sum(0) > 0
    assert seen[:, 2].all()
    assert not seen[:, [0, 1, 3, 4]].any()
