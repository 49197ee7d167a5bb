"""MAE: golden values of the official code, properties of the loss, and what the encoder sees."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from golden_cases import Case, golden_cases
from method_runs import check_two_ranks, config_of
from sslcli.backbones.resnet import ResNet
from sslcli.backbones.vit import VisionTransformer
from sslcli.methods.mae import MAE, PatchDecoder, masked_error, patch_statistics, patchify, unpatchify
from sslcli.nn.masks import random_mask, take_patches
from tiny import make_batch, vit


def build(backbone: nn.Module | None = None, **options: Any) -> MAE:
    """For images of 8 pixels, in 4 x 4 patches of 2 pixels."""
    values = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2} | options
    torch.manual_seed(0)
    return MAE(vit() if backbone is None else backbone, image_size=8, **values)


@golden_cases("mae", but_not=("mae_decoder", "mae_encoder"))
def test_loss_and_patch_order_are_those_of_the_official_code(case: Case) -> None:
    x, patch_size = case.inputs, case.params["patch"]
    mask = case.tensors["mask"]
    patches = patchify(x["imgs"], patch_size)
    case.check(patches, "patches")
    for name in ("norm", "raw"):
        prediction = x["pred"].clone().requires_grad_()
        loss = masked_error(prediction, patches, mask, normalize=name == "norm")
        loss.backward()
        case.check(loss, f"loss_{name}")
        case.check(prediction.grad, f"grad_pred_{name}")
    if "unpatchified" in case.outputs:
        side = case.params["image"] // patch_size
        case.check(unpatchify(x["pred"], (side, side), patch_size), "unpatchified")


@golden_cases("mae_decoder")
def test_input_and_output_of_the_decoder_are_those_of_the_official_code(case: Case) -> None:
    x, p = case.inputs, case.params
    side = int(p["patches"] ** 0.5)
    decoder = PatchDecoder(
        p["D"],
        grid=(side, side),
        dim=p["D_decoder"],
        depth=0,
        num_heads=1,
        out_features=p["out"],
        num_prefix_tokens=1,
    ).to(case.dtype)
    decoder.norm = nn.Identity()  # type: ignore[assignment]
    decoder.pos_embed = x["decoder_pos_embed"]
    with torch.no_grad():
        for part, name in ((decoder.embed, "decoder_embed"), (decoder.predict, "decoder_pred")):
            part.weight.copy_(x[f"{name}.weight"])
            part.bias.copy_(x[f"{name}.bias"])
        decoder.mask_token.copy_(x["mask_token"])
    latent = x["latent"].requires_grad_()
    out = decoder(latent, x["ids_restore"])
    case.check(out, "out")
    loss = (out * x["coef"]).sum()
    case.check(loss, "loss")
    loss.backward()
    case.check(latent.grad, "grad_latent")
    case.check(decoder.mask_token.grad, "grad_mask_token")


@golden_cases("mae_encoder_input")
def test_input_of_the_encoder_is_that_of_the_official_code(case: Case) -> None:
    x, p = case.inputs, case.params
    side = int(p["patches"] ** 0.5)
    net = VisionTransformer(image_size=4 * side, patch_size=4, width=8, depth=1, num_heads=1).to(case.dtype)
    net.pos_embed = x["pos_embed"]
    net.cls_token = nn.Parameter(x["cls_token"])
    visible = random_mask(x["noise"], p["mask_ratio"])
    case.check(net.input_tokens(x["tokens"], (side, side), keep=visible.keep), "encoder_input")
    case.check(visible.mask.to(case.dtype), "mask")
    assert torch.equal(visible.restore, case.outputs["ids_restore"])


@pytest.mark.parametrize("patch_size", [2, 4])
def test_a_prediction_of_zero_has_one_minus_the_correction_of_bessel(patch_size: int) -> None:
    images = torch.randn(8, 3, 16, 16, dtype=torch.float64)
    patches = patchify(images, patch_size)
    loss = masked_error(torch.zeros_like(patches), patches, torch.ones(patches.shape[:2]), normalize=True)
    assert loss.item() == pytest.approx(1 - 1 / (3 * patch_size**2), abs=1e-4)  # 47 / 48 for patches of 4 pixels


def test_visible_patches_have_no_gradient_and_masked_ones_do() -> None:
    patches = torch.randn(3, 16, 12)
    prediction = torch.randn(3, 16, 12, requires_grad=True)
    mask = random_mask(torch.rand(3, 16), 0.75).mask
    masked_error(prediction, patches, mask, normalize=True).backward()
    assert prediction.grad is not None
    assert not prediction.grad[~mask].any()
    assert prediction.grad[mask].any(1).all()


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_patches_put_together_are_the_images(channels: int) -> None:
    images = torch.randn(2, channels, 8, 12)
    patches = patchify(images, 4)
    assert patches.shape == (2, 6, 16 * channels)
    assert torch.equal(unpatchify(patches, (2, 3), 4), images)
    assert torch.equal(patches[:, 4].unflatten(1, (4, 4, channels)).permute(0, 3, 1, 2), images[:, :, 4:8, 4:8])


def test_patches_of_mean_zero_and_unit_variance() -> None:
    patches = patchify(3 * torch.randn(2, 3, 8, 8, dtype=torch.float64) + 2, 4)
    mean, deviation = patch_statistics(patches)
    normalized = (patches - mean) / deviation
    torch.testing.assert_close(normalized.mean(2), torch.zeros(2, 4, dtype=torch.float64))
    torch.testing.assert_close(normalized.var(2), torch.ones(2, 4, dtype=torch.float64), rtol=1e-4, atol=0)


def test_the_encoder_does_not_see_masked_patches() -> None:
    method = build().eval()
    images = torch.randn(2, 3, 8, 8)
    visible = random_mask(torch.rand(2, 16), 0.75)
    changed = patchify(images, 2)
    changed = unpatchify(torch.where(visible.mask[..., None], torch.randn_like(changed), changed), (4, 4), 2)
    assert not torch.equal(images, changed)
    with torch.no_grad():
        one, other = method.reconstruct(images, visible), method.reconstruct(changed, visible)
    assert one[0].shape == (2, 1 + 4, 16)
    assert torch.equal(one[0], other[0])
    assert torch.equal(one[1], other[1])


def test_a_prediction_is_at_the_place_of_its_patch() -> None:
    """A decoder without positions predicts the same for all masked patches, and other values for visible ones."""
    method = build().eval()
    method.decoder.pos_embed.zero_()
    visible = random_mask(torch.rand(2, 16), 0.75)
    with torch.no_grad():
        _, prediction = method.reconstruct(torch.randn(2, 3, 8, 8), visible)
    for image in (0, 1):
        masked, seen = prediction[image][visible.mask[image]], prediction[image][~visible.mask[image]]
        torch.testing.assert_close(masked, masked[:1].expand_as(masked))
        assert all(not torch.allclose(row, masked[0]) for row in seen)


def test_the_loss_is_that_of_a_reconstruction_with_the_masks_that_were_drawn() -> None:
    method = build(normalize_pixels=False)
    batch = make_batch(4, views=1)
    state = method.noise.get_extra_state()
    found = method(batch)["loss"]
    method.noise.set_extra_state(state)
    visible = random_mask(method.noise.uniform(4, 16, device=torch.device("cpu")), 0.75)
    assert visible.mask.sum(1).tolist() == [12] * 4
    tokens, prediction = method.reconstruct(batch.views[0], visible)
    assert torch.equal(tokens, method.backbone.tokens(batch.views[0], keep=visible.keep)[0])
    error = (prediction - patchify(batch.views[0], 2)).square()[visible.mask].mean()
    torch.testing.assert_close(found, error)
    torch.testing.assert_close(method.embeddings[0], tokens[:, 1:].detach().mean(1))


@pytest.mark.parametrize("registers", [0, 2])
def test_all_parameters_have_a_gradient(registers: int) -> None:
    method = build(vit(registers=registers))
    method(make_batch(8, views=1))["loss"].backward()
    assert [name for name, p in method.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_two_processes_compute_what_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = build(vit(drop_path=0.3)).double()
    check_two_ranks(whole, monkeypatch)


def test_pictures_are_the_same_each_time_and_keep_the_visible_patches() -> None:
    method = build().eval()
    images, state = torch.randn(3, 3, 8, 8), method.noise.get_extra_state()
    with torch.no_grad():
        first, again = (method.pictures(images)["reconstruction"] for _ in range(2))
    assert torch.equal(method.noise.get_extra_state(), state)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    original, seen, drawn = (patchify(row, 2) for row in first)
    torch.testing.assert_close(original, patchify(images, 2))
    masked = (seen == 0).all(2)
    assert masked.sum(1).tolist() == [12] * 3
    assert torch.equal(drawn[~masked], original[~masked])
    assert not torch.isclose(drawn[masked], original[masked]).all()


def test_a_perfect_prediction_of_normalized_patches_is_drawn_as_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    method = build().eval()
    images = torch.randn(3, 3, 8, 8)
    patches = patchify(images, 2)
    mean, deviation = patch_statistics(patches)
    monkeypatch.setattr(method, "reconstruct", lambda *_: (torch.zeros(0), (patches - mean) / deviation))
    torch.testing.assert_close(method.pictures(images)["reconstruction"][2], images)


def test_the_loss_is_in_float32_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        loss = build()(make_batch(4, views=1))["loss"]
    assert loss.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_ratio": 0.0}, r"mask_ratio is 0.0.*MAE uses 0.75"),
        ({"mask_ratio": 1.0}, r"mask_ratio is 1.0"),
        ({"mask_ratio": 0.95}, r"mask_ratio is 0.95.*at least 1 of the 16 patches"),
        ({"decoder_dim": 18}, r"decoder_dim is 18.*divisible by 4"),
        ({"decoder_dim": 20, "decoder_heads": 3}, r"divisible by .*decoder_heads=3"),
        ({"decoder_depth": 0}, "decoder_depth is 0"),
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
    build().check_views([torch.zeros(2, 3, 8, 8)])


def test_the_startup_table_names_the_patches() -> None:
    assert build().effective(8) == {"patches": "4 x 4 of 2 pixels", "visible patches": "4 of 16"}


def test_tokens_are_gathered_in_the_order_of_the_patches() -> None:
    visible = random_mask(torch.rand(2, 9), 0.5)
    places = torch.arange(9.0)[None, :, None].expand(2, -1, 1)
    seen = take_patches(places, visible.keep)
    filled = torch.cat([seen, torch.full((2, 9 - seen.shape[1], 1), -1.0)], 1)
    restored = take_patches(filled, visible.restore)
    assert torch.equal(restored, torch.where(visible.mask[..., None], -1.0, places))


def test_features_that_share_a_large_mean_are_not_reported_as_a_collapse() -> None:
    assert config_of("mae").monitor.on_collapse == "ignore"
