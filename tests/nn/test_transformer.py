"""Transformer blocks."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as fused

from sslcli.nn.transformer import Block, LayerScale, attend, drop_path, init_linear


def test_attention_equals_softmax_written_out() -> None:
    block = Block(24, num_heads=3, hidden=48)
    x = torch.randn(2, 5, 24)
    heads = []
    q, k, v = block.attn.qkv(x).chunk(3, dim=2)
    for head in range(3):
        part = slice(8 * head, 8 * head + 8)
        weight = (q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(8)).softmax(-1)
        heads.append(weight @ v[..., part])
    torch.testing.assert_close(block.attn(x), block.attn.proj(torch.cat(heads, dim=2)))


@pytest.mark.parametrize(("dtype", "tokens", "explicit"), [("bfloat16", 9, 1), ("bfloat16", 300, 0), ("float32", 9, 0)])
def test_explicit_and_fused_attention_give_the_same_features_and_gradients(
    dtype: str, tokens: int, explicit: int
) -> None:
    wanted = [torch.randn(2, 3, length, 4).to(getattr(torch, dtype)) for length in (5, tokens, tokens)]
    found = [tensor.clone().requires_grad_() for tensor in wanted]
    for tensor in wanted:
        tensor.requires_grad_()
    with mock.patch("torch.nn.functional.scaled_dot_product_attention", wraps=fused) as calls:
        out = attend(*found)
    assert calls.call_count == 1 - explicit
    expected = fused(*wanted)
    assert out.dtype == expected.dtype
    tolerance = {"rtol": 0.02, "atol": 0.02} if explicit else {}
    torch.testing.assert_close(out, expected, **tolerance)
    for result in (out, expected):
        result.float().square().sum().backward()
    torch.testing.assert_close([t.grad for t in found], [t.grad for t in wanted], **tolerance)


def test_drop_path_leaves_out_whole_images_and_keeps_the_mean() -> None:
    kept = torch.tensor([True, False, True, True])
    branch = torch.randn(4, 5, 3)
    found = drop_path(branch, kept, 0.25)
    assert not found[1].any()
    torch.testing.assert_close(found[kept], branch[kept] / 0.75)
    assert drop_path(branch, None, 0.25) is branch


def test_each_branch_of_a_block_has_its_own_choice() -> None:
    block = Block(8, num_heads=2, hidden=16, drop_prob=0.5)
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        attention = x + 2 * block.attn(block.norm1(x))
        mlp = x + 2 * block.mlp(block.norm2(x))
        found = block(x, torch.tensor([[True, False], [False, True]]))
    torch.testing.assert_close(found, torch.stack([attention[0], mlp[1]]))


def test_layer_scale_starts_at_its_initial_value() -> None:
    x = torch.randn(2, 3, 8)
    torch.testing.assert_close(LayerScale(8, 0.5)(x), x / 2)


def test_linear_layers_are_initialized_with_q_k_and_v_each_for_itself() -> None:
    block = nn.Sequential(Block(96, num_heads=3, hidden=384))
    init_linear(block)
    for layer, bound in ((block[0].attn.qkv, math.sqrt(6 / 192)), (block[0].mlp.fc1, math.sqrt(6 / 480))):
        assert 0.98 * bound < layer.weight.abs().max().item() <= bound
        assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
        assert not layer.bias.any()
