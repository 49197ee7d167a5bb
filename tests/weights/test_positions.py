"""Position embeddings for another number of patches."""

from __future__ import annotations

import pytest
import torch

from sslcli.weights.positions import resized_positions


def test_patches_are_resized_as_timm_does_and_the_class_token_is_kept() -> None:
    resample = pytest.importorskip("timm.layers").resample_abs_pos_embed
    positions = torch.randn(1, 1 + 36, 8)
    for side in (3, 4, 9):
        found = resized_positions(positions, 1 + side**2)
        assert found is not None
        torch.testing.assert_close(found[0], resample(positions, new_size=[side, side], num_prefix_tokens=1))
        assert found[1] == f"position embedding resized from 6x6 to {side}x{side} patches"


def test_a_missing_position_of_the_class_token_is_zero() -> None:
    positions = torch.randn(1, 16, 8)
    found = resized_positions(positions, 17)
    assert found is not None
    assert torch.equal(found[0], torch.cat([torch.zeros(1, 1, 8), positions], dim=1))
    assert found[1] == "a zero position added for the class token"


def test_other_embeddings_are_not_resized() -> None:
    for positions, length in (((1, 17, 8), 16), ((1, 15, 8), 17), ((1, 17, 8), 15), ((17, 8), 26), ((2, 17, 8), 26)):
        assert resized_positions(torch.randn(positions), length) is None
    found = resized_positions(torch.randn(1, 17, 8).half(), 26)
    assert found is not None
    assert found[0].dtype == torch.float16
