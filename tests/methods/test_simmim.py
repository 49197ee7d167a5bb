"""SimMIM: golden values of the official code, properties of the loss, and what the encoder sees."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from golden_cases import Case, golden_cases
from method_runs import check_two_ranks, config_of
from sslcli.backbones.resnet import ResNet
from sslcli.backbones.vit import VisionTransformer, masked
from sslcli.methods.mae import patchify
from sslcli.methods.simmim import SimMIM, masked_l1
from sslcli.nn.masks import cell_mask
from tiny import make_batch, vit


def build(backbone: nn.Module | None = None, **options: Any) -> SimMIM:
    """For images of 8 pixels, in 4 x 4 patches of 2 pixels and 2 x 2 cells."""
    torch.manual_seed(0)
    return SimMIM(vit() if backbone is None else backbone, image_size=8, **options)


@golden_cases("simmim_loss")
def test_reconstruction_and_loss_are_those_of_the_official_code(case: Case) -> None:
    x, p = case.inputs, case.params
    side, patch_size = p["grid"], p["patch"]
    net = VisionTransformer(image_size=side * patch_size, patch_size=patch_size, width=8, depth=1, num_heads=1)
    method = SimMIM(net, image_size=side * patch_size)
    method.decoder = nn.Conv2d(p["D"], 3 * patch_size**2, 1)
    method.to(case.dtype)
    with torch.no_grad():
        method.decoder.weight.copy_(x["decoder.0.weight"])
        method.decoder.bias.copy_(x["decoder.0.bias"])
    net.pos_embed, net.cls_token = x["pos_embed"], nn.Parameter(x["cls_token"])
    tokens, token = x["tokens"].requires_grad_(), x["mask_token"].requires_grad_()
    hidden = masked(tokens, x["mask"].flatten(1).bool(), token)
    patches = net.input_tokens(hidden, (side, side))[:, 1:]
    case.check(patches.mT.unflatten(2, (side, side)), "encoder_out")
    drawn = method.decode(patches)
    case.check(drawn, "reconstruction")
    loss = masked_l1(drawn, x["imgs"], x["mask"], patch_size=patch_size)
    loss.backward()
    case.check(loss, "loss")
    case.check(tokens.grad, "grad_tokens")
    case.check(token.grad, "grad_mask_token")
    case.check(method.decoder.weight.grad, "grad_decoder_weight")


def test_a_prediction_of_zero_has_the_mean_absolute_value_of_masked_pixels() -> None:
    images = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    mask = cell_mask(torch.rand(4, 4), (4, 4), cell=2, ratio=0.6).view(4, 4, 4)
    hidden = mask.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, None].expand(-1, 3, -1, -1)
    loss = masked_l1(torch.zeros_like(images), images, mask, patch_size=2)
    assert loss.item() == pytest.approx(images[hidden].abs().mean().item(), rel=1e-12)


def test_visible_pixels_have_no_gradient_and_masked_ones_do() -> None:
    images, drawn = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8, requires_grad=True)
    mask = cell_mask(torch.rand(4, 4), (4, 4), cell=2, ratio=0.6)
    masked_l1(drawn, images, mask.view(4, 4, 4), patch_size=2).backward()
    assert drawn.grad is not None
    of_patches = patchify(drawn.grad, 2)
    assert not of_patches[~mask].any()
    assert (of_patches[mask] != 0).all()


@pytest.mark.parametrize(("ratio", "count"), [(0.6, 3), (0.5, 2), (0.01, 1), (1.0, 4)])
def test_the_number_of_masked_cells_is_rounded_up(ratio: float, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    method, masks = build(mask_ratio=ratio), []
    encode = method.encode
    monkeypatch.setattr(method, "encode", lambda images, mask: masks.append(mask) or encode(images, mask))
    method(make_batch(6, views=1))
    assert masks[0].sum(1).tolist() == [4 * count] * 6
    cells = masks[0].view(6, 2, 2, 2, 2)
    assert torch.equal(cells.any(4).any(2), cells.all(4).all(2))


def test_the_encoder_does_not_see_masked_patches() -> None:
    method = build().eval()
    images = torch.randn(2, 3, 8, 8)
    mask = cell_mask(torch.rand(2, 4), (4, 4), cell=2, ratio=0.6)
    hidden = mask.view(2, 4, 4).repeat_interleave(2, 1).repeat_interleave(2, 2)[:, None]
    with torch.no_grad():
        one, other = (method.encode(each, mask) for each in (images, torch.where(hidden, 1.0, images)))
    assert one.shape == (2, 16, 16)
    assert torch.equal(one, other)


def test_the_loss_is_that_of_a_reconstruction_with_the_masks_that_were_drawn() -> None:
    method = build()
    batch = make_batch(4, views=1)
    state = method.noise.get_extra_state()
    found = method(batch)["loss"]
    method.noise.set_extra_state(state)
    numbers = method.noise.uniform(4, 4, device=torch.device("cpu"))
    mask = cell_mask(numbers, (4, 4), cell=2, ratio=0.6)
    drawn = method.decode(method.encode(batch.views[0], mask))
    error = patchify(drawn - batch.views[0], 2).abs()[mask].mean()
    torch.testing.assert_close(found, error)


def test_all_parameters_have_a_gradient() -> None:
    method = build(vit(registers=2))
    method(make_batch(8, views=1))["loss"].backward()
    assert [name for name, p in method.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_two_processes_compute_what_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = build().double()
    check_two_ranks(whole, monkeypatch)


def test_pictures_are_the_same_each_time_and_keep_the_visible_patches() -> None:
    method = build().eval()
    images, state = torch.randn(3, 3, 8, 8), method.noise.get_extra_state()
    with torch.no_grad():
        first, again = (method.pictures(images)["reconstruction"] for _ in range(2))
    assert torch.equal(method.noise.get_extra_state(), state)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    original, seen, drawn = (patchify(row, 2) for row in first)
    mask = (seen == 0).all(2)
    assert mask.sum(1).tolist() == [12] * 3
    assert torch.equal(drawn[~mask], original[~mask])
    with torch.no_grad():
        torch.testing.assert_close(drawn[mask], patchify(method.decode(method.encode(images, mask)), 2)[mask])


def test_the_loss_is_in_float32_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        loss = build()(make_batch(4, views=1))["loss"]
    assert loss.dtype == torch.float32


@pytest.mark.parametrize(("image_size", "cell"), [(8, 2), (6, 1)])
def test_a_cell_has_two_patches_per_side_if_they_divide_the_image(image_size: int, cell: int) -> None:
    net = VisionTransformer(image_size=image_size, patch_size=2, width=8, depth=1, num_heads=1)
    assert SimMIM(net, image_size=image_size).cell == cell


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_ratio": 0.0}, r"mask_ratio is 0.0.*SimMIM uses 0.6"),
        ({"mask_ratio": 1.5}, r"mask_ratio is 1.5"),
        ({"cell_size": 3}, r"cell_size is 3.*multiple of the patch size 2"),
        ({"cell_size": 6}, r"cell_size is 6.*divide the 8 pixels"),
        ({"cell_size": 0}, r"cell_size is 0"),
    ],
)
def test_wrong_values_are_refused_with_the_remedy(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_a_backbone_without_patches_is_refused() -> None:
    with pytest.raises(ValueError, match="ResNet has no patch tokens: choose backbone=vit_tiny"):
        build(ResNet("resnet18", image_size=8))


def test_a_view_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"12 x 12 pixels.*8 x 8: set views.views.0.size to null"):
        build().check_views([torch.zeros(2, 3, 12, 12)])


def test_the_startup_table_names_patches_and_cells() -> None:
    found = build().effective(8)
    assert found == {"patches": "4 x 4 of 2 pixels", "masked cells": "3 of 4, 4 pixels per side"}


def test_features_that_share_a_large_mean_are_not_reported_as_a_collapse() -> None:
    assert config_of("simmim").monitor.on_collapse == "ignore"
