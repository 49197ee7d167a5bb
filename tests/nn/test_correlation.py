from __future__ import annotations

import pytest
import torch

from sslcli.nn.correlation import off_diagonal_sum_of_squares, sum_of_squares


@pytest.mark.parametrize("rows", [2, 6, 9])
def test_sums_are_those_of_the_explicit_matrix(rows: int) -> None:
    a, b = torch.randn(2, rows, 6, dtype=torch.float64)
    matrix = a.T @ b
    torch.testing.assert_close(sum_of_squares(a, b), matrix.square().sum())
    outside = matrix - torch.diag(matrix.diagonal())
    torch.testing.assert_close(off_diagonal_sum_of_squares(a, b), outside.square().sum())


@pytest.mark.parametrize("rows", [3, 9])
def test_gradients_are_those_of_the_explicit_matrix(rows: int) -> None:
    a, b = torch.randn(2, rows, 6, dtype=torch.float64).unbind()
    a.requires_grad_()
    (found,) = torch.autograd.grad(sum_of_squares(a, b), a)
    (expected,) = torch.autograd.grad((a.T @ b).square().sum(), a)
    torch.testing.assert_close(found, expected)


def test_no_matrix_is_larger_than_necessary() -> None:
    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        values = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            Largest.values = max(Largest.values, out.numel())
            return out

    z = torch.randn(4, 100)
    with Largest():
        off_diagonal_sum_of_squares(z, z)
    assert Largest.values == z.numel()
