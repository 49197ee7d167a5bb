"""Sums over the entries of covariance and correlation matrices, without matrices that are larger than necessary."""

from __future__ import annotations

from torch import Tensor


def sum_of_squares(a: Tensor, b: Tensor) -> Tensor:
    """Return the sum of the squares of all entries of aᵀ b, a scalar, for `a` (G, D) and `b` (G, E).

    This sum is equal to the sum of all entries of the elementwise product of a aᵀ and b bᵀ. With fewer rows than
    columns, as in the losses of VICReg and Barlow Twins, these (G, G) matrices are smaller than aᵀ b. With 256 rows and
    8192 columns, they need 1/16 of the multiplications and 1/1024 of the memory.
    """
    if len(a) < min(a.shape[1], b.shape[1]):
        return ((a @ a.T) * (b @ b.T)).sum()
    return (a.T @ b).square().sum()


def off_diagonal_sum_of_squares(a: Tensor, b: Tensor) -> Tensor:
    """Return the sum of the squares of the entries of aᵀ b outside its diagonal, for `a` and `b` of shape (G, D)."""
    return sum_of_squares(a, b) - (a * b).sum(0).square().sum()
