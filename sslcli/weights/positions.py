"""Position embeddings of vision transformers for another number of patches."""

from __future__ import annotations

from math import isqrt

import torch
from torch import Tensor

from sslcli.backbones.vit import interpolated_positions


def resized_positions(positions: Tensor, length: int) -> tuple[Tensor, str] | None:
    """Return a position embedding (1, L, D) resized to (1, `length`, D), and a note that states what was done.

    L and `length` are the number of patches of a square grid, or one more for the class token, whose row comes first.
    The rows of the patches are resized with antialiased bicubic interpolation, as in timm. If only the result has a
    class token, its row is zero. Returns None if there is no such grid, or if only `positions` has a class token.
    """
    if positions.ndim != 3 or len(positions) != 1:
        return None
    before, after = _has_class_token(positions.shape[1]), _has_class_token(length)
    if before is None or after is None or (before and not after):
        return None
    first, patches = positions[:, : int(before)], positions[:, int(before) :]
    old, new = isqrt(patches.shape[1]), isqrt(length - int(after))
    notes = []
    if after and not before:
        first = torch.zeros_like(patches[:, :1])
        notes.append("a zero position added for the class token")
    positions = torch.cat([first, patches], dim=1)
    if old != new:
        positions = interpolated_positions(positions, (old, old), (new, new))
        notes.append(f"position embedding resized from {old}x{old} to {new}x{new} patches")
    return positions, ", ".join(notes)


def _has_class_token(length: int) -> bool | None:
    """Return True if `length` is a square plus one, False if it is a square, and None otherwise."""
    if length > 1 and isqrt(length - 1) ** 2 == length - 1:
        return True
    return False if isqrt(length) ** 2 == length else None
