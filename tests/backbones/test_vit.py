from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from golden_cases import Case, golden_cases
from sslcli.backbones.vit import VisionTransformer, choose_patch_size, masked, position_embedding
from sslcli.nn import noise


def vit(image_size: int = 32, **changes: Any) -> VisionTransformer:
    values: dict[str, Any] = {"patch_size": 8, "width": 24, "depth": 2, "num_heads": 3} | changes
    return VisionTransformer(image_size=image_size, **values)


@pytest.mark.parametrize(("image_size", "grid"), [(32, 8), (64, 16), (96, 16), (224, 14)])
def test_shapes_at_every_image_size_with_the_patch_size_chosen(image_size: int, grid: int) -> None:
    net = vit(image_size, patch_size=None)
    images = torch.randn(2, 3, image_size, image_size)
    assert net.num_features == 24
    assert net.patch_size == image_size // grid
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


def test_a_position_embedding_of_other_weights_is_interpolated_instead() -> None:
    resample = pytest.importorskip("timm.layers").resample_abs_pos_embed
    net = vit()
    state = copy.deepcopy(net.state_dict())
    exact = net.positions((3, 2))
    net.load_state_dict(
        {name: value.bfloat16() if value.is_floating_point() else value for name, value in state.items()}
    )
    torch.testing.assert_close(net.positions((3, 2)), exact, atol=1e-6, rtol=0)
    learned = torch.randn(1, 17, 24, generator=torch.Generator().manual_seed(0))
    net.load_state_dict(state | {"pos_embed": learned})
    assert torch.equal(net.positions((4, 4)), learned)
    found = copy.deepcopy(net).positions((3, 2))
    torch.testing.assert_close(found, resample(learned, new_size=[3, 2], num_prefix_tokens=1))
    net.load_state_dict(state)
    assert torch.equal(net.positions((3, 2)), exact)


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


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_gradients_reach_every_trainable_parameter(pool: str) -> None:
    net = vit(pool=pool, registers=2, layer_scale=0.1)
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


def test_drop_path_grows_linearly_over_the_blocks() -> None:
    rates = [block.drop_prob for block in vit(depth=3, drop_path=0.2).blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2])


def test_drop_path_drops_each_branch_of_an_image_at_the_rate_of_its_block() -> None:
    net = vit(depth=3, drop_path=0.5)
    kept = list(net.kept_branches(4000, torch.device("cpu")))
    assert kept[0] is None  # of rate 0
    assert kept[1] is not None
    assert kept[2] is not None
    assert kept[1].shape == (2, 4000)
    assert kept[1].float().mean(1).tolist() == pytest.approx([0.75, 0.75], abs=0.03)
    assert kept[2].float().mean(1).tolist() == pytest.approx([0.5, 0.5], abs=0.03)
    assert (kept[2][0] != kept[2][1]).any()
    assert list(net.eval().kept_branches(8, torch.device("cpu"))) == [None] * 3
    assert vit().noise is None  # a network without stochastic depth has the state_dict of timm


def test_drop_path_does_not_depend_on_torch_s_generator_and_continues_after_loading() -> None:
    net = vit(drop_path=0.5)
    images = torch.randn(8, 3, 32, 32)
    net(images)
    twin = vit(drop_path=0.5)
    twin.load_state_dict(net.state_dict())
    expected = net(images)
    torch.manual_seed(7)
    assert torch.equal(twin(images), expected)
    assert not torch.equal(net(images), expected)


def test_drop_path_is_the_same_for_one_process_and_for_two(monkeypatch: pytest.MonkeyPatch) -> None:
    net = vit(drop_path=0.5)
    assert net.noise is not None
    images, state = torch.randn(6, 3, 32, 32), net.noise.get_extra_state()
    whole, parts = net(images), []
    for rank in (0, 1):
        net.noise.set_extra_state(state)
        monkeypatch.setattr(noise, "rank", lambda rank=rank: rank)
        parts.append(net(images[3 * rank : 3 * rank + 3]))
    torch.testing.assert_close(torch.cat(parts), whole)


def test_masked_patches_are_replaced_by_the_mask_token_before_positions_are_added() -> None:
    net = vit().eval()
    images, token = torch.randn(2, 3, 32, 32), torch.randn(1, 1, 24)
    mask = torch.rand(2, 16, generator=torch.Generator().manual_seed(0)) < 0.5
    seen: list[Tensor] = []
    net.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        net.tokens(images)
        net.tokens(images, mask=mask, mask_token=token)
    plain, masked = (each[:, 1:] for each in seen)
    assert torch.equal(masked[~mask], plain[~mask])
    assert torch.equal(masked[mask], (token + net.pos_embed[:, 1:]).expand(2, -1, -1)[mask])


def test_what_lies_under_the_mask_changes_nothing() -> None:
    net, token = vit().eval(), torch.randn(1, 1, 24)
    images = torch.randn(1, 3, 32, 32)
    mask = torch.zeros(1, 16, dtype=torch.bool)
    mask[0, 5] = True  # row 1, column 1
    changed = images.clone()
    changed[:, :, 8:16, 8:16] += 1
    with torch.no_grad():
        one, other = (net.tokens(each, mask=mask, mask_token=token)[0] for each in (images, changed))
    assert torch.equal(one, other)


@pytest.mark.parametrize("side", [32, 48])
@pytest.mark.parametrize("registers", [0, 3])
def test_kept_patches_have_the_positions_they_have_among_all(side: int, registers: int) -> None:
    net = vit(registers=registers).eval()
    images = torch.randn(2, 3, side, side)
    num_patches = (side // 8) ** 2
    keep = torch.stack([torch.randperm(num_patches, generator=torch.Generator().manual_seed(n))[:5] for n in (0, 1)])
    seen: list[Tensor] = []
    net.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        full, grid = net.tokens(images)
        part, same_grid = net.tokens(images, keep=keep)
        everything, _ = net.tokens(images, keep=torch.arange(num_patches).expand(2, -1))
    first = net.num_prefix_tokens
    assert first == 1 + registers
    assert part.shape == (2, first + 5, 24)
    assert grid == same_grid
    for n in (0, 1):
        assert torch.equal(seen[1][n, first:], seen[0][n, first:][keep[n]])
    assert torch.equal(seen[1][:, :first], seen[0][:, :first])
    assert torch.equal(everything, full)


def test_masks_that_do_not_fit_are_refused() -> None:
    images = torch.zeros(2, 3, 32, 32)
    with pytest.raises(ValueError, match="mask is given without mask_token"):
        vit().tokens(images, mask=torch.ones(2, 16, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"mask has the shape \(2, 9\), but the patches have \(2, 16\)"):
        vit().tokens(images, mask=torch.ones(2, 9, dtype=torch.bool), mask_token=torch.zeros(1, 1, 24))


@golden_cases("masked_tokens")
def test_input_of_the_blocks_is_that_of_ibot_and_of_dinov2(case: Case) -> None:
    x = case.inputs
    images, width, side = x["patches"].shape[:3]
    for registers, expected in ((0, "tokens_ibot"), (case.params["registers"], "tokens_dinov2")):
        net = VisionTransformer(
            image_size=8 * side, patch_size=8, width=width, depth=1, num_heads=1, registers=registers
        ).to(case.dtype)
        with torch.no_grad():
            net.cls_token.copy_(x["cls_token"])
            net.pos_embed.copy_(x["pos_embed"])
            if net.reg_token is not None:
                net.reg_token.copy_(x["register_tokens"])
        patches, token = x["patches"].clone().requires_grad_(), x["mask_token"].clone().requires_grad_()
        replaced = masked(patches.flatten(2).mT, x["mask"].flatten(1).bool(), token)
        found = net.input_tokens(replaced, (side, side))
        case.check(found, expected)
        if not registers:
            loss = (found * x["coef"]).sum()
            loss.backward()
            case.check(loss, "loss")
            case.check(token.grad, "grad_mask_token")
            case.check(patches.grad, "grad_patches")
    assert images == len(x["mask"])


@golden_cases("sincos_pos")
def test_positions_are_those_of_mae_with_the_row_before_the_column(case: Case) -> None:
    dim, grid = case.params["D"], case.params["grid"]
    column_sin, column_cos, row_sin, row_cos = case.outputs["pos_embed"][1:].chunk(4, dim=1)
    found = position_embedding(grid, grid, dim)
    torch.testing.assert_close(
        found.to(case.dtype), torch.cat([row_sin, row_cos, column_sin, column_cos], dim=1), rtol=1e-5, atol=2e-6
    )
    net = VisionTransformer(image_size=8 * grid, patch_size=8, width=dim, depth=1, num_heads=1)
    assert not net.pos_embed[0, 0].any()
    assert not case.outputs["pos_embed"][0].any()


def test_registers_take_part_in_attention_and_are_left_out_of_features() -> None:
    net = vit(registers=2, pool="mean").eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        tokens, _ = net.tokens(images)
        assert tokens.shape == (2, 3 + 16, 24)
        torch.testing.assert_close(net(images), tokens[:, 3:].mean(1))
        torch.testing.assert_close(net.stages(images)["patches"].flatten(2).mT, tokens[:, 3:])
        before = net(images)
        net.reg_token.add_(1)
        assert not torch.allclose(net(images), before)


def test_layer_scale_multiplies_each_branch() -> None:
    net = vit(layer_scale=1e-5).eval()
    images = torch.randn(2, 3, 32, 32)
    assert net.blocks[0].ls1.gamma.tolist() == pytest.approx([1e-5] * 24)
    plain = vit().eval()
    plain.load_state_dict({name: value for name, value in net.state_dict().items() if ".ls" not in name})
    with torch.no_grad():
        for block in net.blocks:
            block.ls1.gamma.fill_(1)
            block.ls2.gamma.fill_(1)
        assert torch.equal(net(images), plain(images))
        for block in net.blocks:
            block.ls1.gamma.zero_()
            block.ls2.gamma.zero_()
        torch.testing.assert_close(net(images), net.norm(net.cls_token[:, 0]).expand(2, -1))


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
    more = {name for name in vit(depth=1, registers=1, layer_scale=0.1).state_dict() if isinstance(name, str)}
    assert more - keys == {"reg_token", "blocks.0.ls1.gamma", "blocks.0.ls2.gamma"}


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
        ({"registers": -1}, "registers is -1"),
        ({"layer_scale": 0.0}, r"layer_scale is 0.0"),
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
