from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sslcli.backbones.vit import Block, DropPath, VisionTransformer, choose_patch_size, position_embedding


def vit(image_size: int = 32, **changes: Any) -> VisionTransformer:
    values: dict[str, Any] = {"patch_size": 8, "width": 24, "depth": 2, "num_heads": 3} | changes
    return VisionTransformer(image_size=image_size, **values)


@pytest.mark.parametrize(("image_size", "grid"), [(32, 8), (64, 16), (96, 16), (224, 14)])
def test_shapes_at_every_image_size_with_the_patch_size_chosen(image_size: int, grid: int) -> None:
    net = vit(image_size, patch_size=None)
    images = torch.randn(2, 3, image_size, image_size)
    assert net.num_features == 24
    assert net(images).shape == (2, 24)
    assert {name: tuple(value.shape) for name, value in net.stages(images).items()} == {"patches": (2, 24, grid, grid)}


def test_position_embedding_is_the_formula_element_by_element() -> None:
    height, width, dim = 3, 5, 16
    table = position_embedding(height, width, dim)
    for row in range(height):
        for column in range(width):
            for i in range(dim // 4):
                omega = 1 / 10000 ** (i / (dim // 4))
                expected = [math.sin(row * omega), math.cos(row * omega)]
                expected += [math.sin(column * omega), math.cos(column * omega)]
                found = table[row * width + column][i :: dim // 4].tolist()
                assert found == pytest.approx(expected, abs=1e-5)


def test_position_embedding_is_not_trained_but_saved_and_zero_for_the_class_token() -> None:
    net = vit()
    assert "pos_embed" not in dict(net.named_parameters())
    assert torch.equal(net.state_dict()["pos_embed"][0, 1:], position_embedding(4, 4, 24))
    assert not net.pos_embed[:, 0].any()


@pytest.mark.parametrize("side", [16, 48])
def test_other_image_sizes_see_the_same_embedding_interpolated(side: int) -> None:
    net = vit(64, width=64, num_heads=4)
    grid = side // 8
    found = net.positions((grid, grid))[0, 1:].T.reshape(64, grid, grid)
    trained = net.pos_embed[0, 1:].T.reshape(1, 64, 8, 8)
    interpolated = F.interpolate(trained, (grid, grid), mode="bicubic", align_corners=False)[0]
    slow = torch.arange(64) % 16 >= 4  # sampled finely enough that interpolation is near exact
    inside = slice(grid // 3, -(grid // 3) or None)
    torch.testing.assert_close(found[slow][:, inside, inside], interpolated[slow][:, inside, inside], atol=0.01, rtol=0)
    assert net(torch.randn(2, 3, side, side)).shape == (2, 64)


def test_positions_of_a_view_that_is_not_square() -> None:
    net = vit(32)
    assert net.stages(torch.randn(2, 3, 16, 48))["patches"].shape == (2, 24, 2, 6)


def test_the_map_of_patches_keeps_rows_and_columns() -> None:
    net = vit(32, depth=1).eval()
    with torch.no_grad():
        net.blocks[0].attn.proj.weight.zero_()  # no mixing of tokens: a patch changes its own place alone
        images = torch.randn(1, 3, 32, 32)
        changed = images.clone()
        changed[:, :, 8:16, 24:32] += 1
        differs = (net.stages(images)["patches"] != net.stages(changed)["patches"]).any(1)[0]
    assert differs.nonzero().tolist() == [[1, 3]]


def test_pool_takes_the_class_token_or_the_mean_of_the_patches() -> None:
    cls, mean = vit(pool="cls").eval(), vit(pool="mean").eval()
    mean.load_state_dict(cls.state_dict())
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        tokens, grid = cls.tokens(images)
        assert grid == (4, 4)
        torch.testing.assert_close(cls(images), tokens[:, 0])
        torch.testing.assert_close(mean(images), cls.stages(images)["patches"].mean((2, 3)))


def test_attention_equals_softmax_written_out() -> None:
    block = Block(24, num_heads=3, hidden=48, drop_prob=0.0)
    x = torch.randn(2, 5, 24)
    heads = []
    q, k, v = block.attn.qkv(x).chunk(3, dim=2)
    for head in range(3):
        part = slice(8 * head, 8 * head + 8)
        weight = (q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(8)).softmax(-1)
        heads.append(weight @ v[..., part])
    torch.testing.assert_close(block.attn(x), block.attn.proj(torch.cat(heads, dim=2)))


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_gradients_reach_every_trainable_parameter(pool: str) -> None:
    net = vit(pool=pool)
    (net(torch.randn(4, 3, 32, 32)) * torch.randn(24)).sum().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_a_frozen_patch_projection_takes_no_gradient_and_all_else_does() -> None:
    net = vit(frozen_patch_projection=True)
    net(torch.randn(4, 3, 32, 32)).square().sum().backward()
    without = {name for name, parameter in net.named_parameters() if parameter.grad is None}
    assert without == {"patch_embed.proj.weight", "patch_embed.proj.bias"}
    assert all(parameter.requires_grad for parameter in vit().parameters())


def test_weights_start_uniform_with_q_k_v_each_for_itself() -> None:
    net = vit(width=96)
    block = net.blocks[0]
    bounds = {
        block.attn.qkv: math.sqrt(6 / (96 + 96)),
        block.attn.proj: math.sqrt(6 / (96 + 96)),
        block.mlp.fc1: math.sqrt(6 / (96 + 4 * 96)),
        net.patch_embed.proj: math.sqrt(6 / (3 * 8 * 8 + 96)),
    }
    for layer, bound in bounds.items():
        assert 0.98 * bound < layer.weight.abs().max().item() <= bound
        assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
        assert not layer.bias.any()
    assert 0 < net.cls_token.std().item() < 1e-5


def test_drop_path_leaves_out_whole_images_keeps_the_mean_and_rests_in_evaluation() -> None:
    torch.manual_seed(0)
    drop = DropPath(0.25)
    out = drop(torch.ones(4000, 2, 3))
    assert sorted(out.unique().tolist()) == pytest.approx([0.0, 4 / 3])
    assert torch.equal(out.amin((1, 2)), out.amax((1, 2)))
    assert out.mean().item() == pytest.approx(1, abs=0.05)
    assert torch.equal(drop.eval()(torch.ones(8, 2, 3)), torch.ones(8, 2, 3))


def test_drop_path_grows_linearly_over_the_blocks() -> None:
    rates = [block.drop_path.drop_prob for block in vit(depth=3, drop_path=0.2).blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2])


def test_channels_last_changes_nothing_but_the_layout() -> None:
    net = vit().eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = net(images)
        fast = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        torch.testing.assert_close(fast(images.to(memory_format=torch.channels_last)), expected, atol=1e-5, rtol=1e-5)


def test_a_copy_for_a_momentum_encoder_keeps_the_output() -> None:
    from sslcli.nn.ema import frozen_copy

    net = vit(drop_path=0.5).eval()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(frozen_copy(net).train()(images), net(images))


def test_keys_are_those_of_timm() -> None:
    keys = {name for name in vit(depth=1).state_dict() if isinstance(name, str)}
    parts = ["norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"]
    layers = ["patch_embed.proj", *(f"blocks.0.{part}" for part in parts), "norm"]
    assert keys == {"cls_token", "pos_embed", *(f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias"))}


@pytest.mark.parametrize(
    ("image_size", "patch_size"),
    [(28, 4), (32, 4), (48, 4), (64, 4), (96, 6), (128, 8), (224, 16), (256, 16), (384, 24)],
)
def test_the_chosen_patch_size_divides_the_image(image_size: int, patch_size: int) -> None:
    assert choose_patch_size(image_size) == patch_size


@pytest.mark.parametrize("image_size", [8, 37, 62])
def test_no_patch_size_is_chosen_where_none_fits(image_size: int) -> None:
    with pytest.raises(ValueError, match=rf"divides image_size={image_size}.*set patch_size"):
        choose_patch_size(image_size)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"image_size": 30},
            r"=30 is not divisible by patch_size=8: set patch_size to 2, 3, 5, 6, 10, 15",
        ),
        ({"image_size": 31}, r"set patch_size to 31"),
        ({"patch_size": 0}, "patch_size is 0"),
        ({"width": 26, "num_heads": 2}, r"width=26 must be divisible by 4"),
        ({"num_heads": 5}, r"by num_heads=5"),
        ({"depth": 0}, "depth is 0"),
        ({"mlp_ratio": 0}, "mlp_ratio is 0"),
        ({"pool": "max"}, r"pool is 'max'.*cls, mean"),
        ({"drop_path": 1.0}, r"drop_path is 1.0"),
    ],
)
def test_wrong_values_are_refused_with_the_remedy(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vit(**changes)


def test_a_view_that_does_not_divide_into_patches_is_refused() -> None:
    with pytest.raises(ValueError, match=r"32 x 36 pixels do not divide into patches of 8: set the size of the view"):
        vit()(torch.zeros(1, 3, 32, 36))


def test_no_layer_normalizes_over_images() -> None:
    norms = (nn.BatchNorm1d, nn.BatchNorm2d)
    assert not any(isinstance(part, norms) for part in vit().modules())
