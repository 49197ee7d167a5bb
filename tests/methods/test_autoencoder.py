from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from golden_cases import Case, golden_cases
from processes import Pair
from sslcli.backbones.base import Backbone
from sslcli.backbones.small import Small
from sslcli.errors import ConfigError
from sslcli.methods.autoencoder import CORRUPTIONS, LOSSES, Autoencoder, patch_statistics, reconstruction_loss
from sslcli.methods.base import Batch
from sslcli.nn.batch_norm import SyncBatchNorm
from sslcli.nn.decoder import check_images, psnr
from tiny import TinyNet, copied_state, equal_states


class Flat(nn.Module):
    """The image itself as features: what a linear autoencoder codes."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)


def tiny(**changes: object) -> Autoencoder:
    torch.manual_seed(0)
    return Autoencoder(TinyNet(), **({"image_size": 8, "dim": 4, "width": 4} | changes))


def copying(**changes: object) -> Autoencoder:
    """An autoencoder whose code is the image and whose decoder gives it back."""
    method = Autoencoder(Flat(3 * 64), **({"image_size": 8, "dim": 2, "width": 2} | changes))
    method.to_code, method.decoder = nn.Identity(), nn.Unflatten(1, (3, 8, 8))
    return method


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def batch_of(images: Tensor) -> Batch:
    return Batch([images], torch.arange(len(images)), torch.zeros(len(images), dtype=torch.long))


@pytest.mark.parametrize("corruption", [None, *CORRUPTIONS])
def test_an_image_that_comes_back_unchanged_costs_nothing(corruption: str | None) -> None:
    found = copying(corruption=corruption, strength=0.0)(batch_of(rand(4, 3, 8, 8)))
    assert float(found["loss"]) == 0.0
    assert float(found["psnr"]) == pytest.approx(100.0)


def test_loss_is_the_mean_squared_error_to_the_clean_image() -> None:
    method, images = tiny(corruption="pixel_mask").double(), rand(6, 3, 8, 8)
    seen: list[Tensor] = []
    method.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    found = method(batch_of(images))
    drawn = method.decoder(method.projection(seen[0]))
    assert not torch.equal(seen[0], images)
    torch.testing.assert_close(found["loss"], ((drawn - images) ** 2).mean(), rtol=0, atol=1e-7)
    expected = torch.stack([-10 * ((a - b) ** 2).mean().log10() for a, b in zip(drawn, images, strict=True)]).mean()
    torch.testing.assert_close(found["psnr"], expected.detach())


class Mosaic(Backbone):
    """One channel with the mean of each 2 x 2 square: its mean over positions cannot tell where a square is."""

    num_features = 1

    def forward(self, images: Tensor) -> Tensor:
        return self.stages(images)["squares"].mean((2, 3))

    def stages(self, images: Tensor) -> dict[str, Tensor]:
        return {"early": images, "squares": F.avg_pool2d(images.mean(1, keepdim=True), 2)}


@pytest.mark.parametrize(("code_from", "inputs"), [("features", 1), ("map", 16)])
def test_the_code_is_computed_from_the_features_or_from_every_position_of_the_last_map(
    code_from: str, inputs: int
) -> None:
    torch.manual_seed(0)
    method = Autoencoder(Mosaic(), image_size=8, dim=4, width=2, code_from=code_from).double()
    images = rand(4, 3, 8, 8)
    assert method.to_code.in_features == inputs
    given = method.backbone(images) if code_from == "features" else F.avg_pool2d(images.mean(1, keepdim=True), 2)
    torch.testing.assert_close(method.projection(images), method.to_code(given.flatten(1)))
    moved = images.roll(2, -1)  # the same squares at other positions
    assert torch.allclose(method.projection(moved), method.projection(images)) == (code_from == "features")
    assert torch.equal(method.features(images), method.backbone(images))


def test_an_old_configuration_has_its_code_from_the_features() -> None:
    assert tiny().code_from == "features"


def test_finding_the_map_leaves_the_statistics_of_the_backbone_unchanged() -> None:
    torch.manual_seed(0)
    backbone = Small(image_size=16, width=2)
    before = copied_state(backbone)
    assert equal_states(Autoencoder(backbone, image_size=16, width=2, code_from="map").backbone.state_dict(), before)


@pytest.mark.parametrize("kind", LOSSES)
def test_order_of_images_and_their_repetition_do_not_matter(kind: str) -> None:
    drawn, images = torch.randn(5, 3, 8, 8, dtype=torch.float64), rand(5, 3, 8, 8)
    loss = reconstruction_loss(drawn, images, kind=kind)
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(reconstruction_loss(drawn[order], images[order], kind=kind), loss)
    torch.testing.assert_close(
        reconstruction_loss(drawn.repeat(2, 1, 1, 1), images.repeat(2, 1, 1, 1), kind=kind), loss
    )


def test_absolute_and_binary_losses_are_means_over_every_value() -> None:
    drawn, images = torch.randn(2, 1, 2, 2, dtype=torch.float64), rand(2, 1, 2, 2)
    values = list(zip(drawn.flatten().tolist(), images.flatten().tolist(), strict=True))
    absolute = sum(abs(d - x) for d, x in values) / 8
    binary = sum(x * math.log1p(math.exp(-d)) + (1 - x) * math.log1p(math.exp(d)) for d, x in values) / 8
    assert float(reconstruction_loss(drawn, images, kind="l1")) == pytest.approx(absolute)
    assert float(reconstruction_loss(drawn, images, kind="bce")) == pytest.approx(binary)


@golden_cases("mae", but_not=("mae_decoder", "mae_encoder", "mae_pixels"))
def test_loss_of_standardized_patches_equals_the_official_code(case: Case) -> None:
    images, size = case.inputs["imgs"], case.params["patch"]
    side = images.shape[-1] // size
    removed = case.outputs["mask"]

    def to_image(patches: Tensor) -> Tensor:  # (N, L, p * p * C) -> (N, C, S, S)
        parts = patches.unflatten(2, (size, size, -1)).unflatten(1, (side, side))
        return parts.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)

    torch.testing.assert_close(to_image(case.outputs["patches"]), images)
    mean, deviation = patch_statistics(images, size)
    target = (images - mean) / deviation
    pred = case.inputs["pred"].requires_grad_()
    # The official loss is the mean over removed patches: draw the others without error.
    drawn = torch.where(to_image(removed[..., None].expand_as(pred)) > 0, to_image(pred), target)
    loss = reconstruction_loss(drawn, images, kind="patch", patch_size=size) * removed.numel() / removed.sum()
    loss.backward()
    case.check(loss, "loss_norm")
    case.check(pred.grad, "grad_pred_norm")


def test_patches_drawn_as_the_loss_wants_them_become_the_image() -> None:
    method, images = tiny(loss="patch"), rand(3, 3, 8, 8)
    mean, deviation = patch_statistics(images, 4)
    target = (images - mean) / deviation
    assert float(reconstruction_loss(target, images, kind="patch")) == 0.0
    torch.testing.assert_close(method.pixels(target, images), images)


def test_logits_become_pixels() -> None:
    images = rand(3, 3, 8, 8)
    torch.testing.assert_close(tiny(loss="bce").pixels(images.logit(), images), images)


def test_a_linear_autoencoder_finds_the_principal_components() -> None:
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(12, 12, generator=generator, dtype=torch.float64))
    spread = torch.tensor([0.2, 0.15, 0.12, *[0.04] * 9], dtype=torch.float64)
    images = (0.5 + torch.randn(64, 12, generator=generator, dtype=torch.float64) * spread @ basis).clamp(0, 1)
    method = Autoencoder(Flat(12), image_size=8, dim=3, width=2)
    method.decoder = nn.Sequential(nn.Linear(3, 12), nn.Unflatten(1, (3, 2, 2)))
    method.first_look.shape = (3, 2, 2)
    method.double()
    batch = batch_of(images.view(64, 3, 2, 2))
    descent = torch.optim.LBFGS(
        method.parameters(), max_iter=1000, tolerance_grad=1e-8, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        descent.zero_grad()
        loss = method(batch)["loss"]
        loss.backward()
        return loss

    descent.step(closure)
    loss = method(batch)["loss"]
    centered = images - images.mean(0)
    _, singular, axes = torch.linalg.svd(centered, full_matrices=False)
    found, _ = torch.linalg.qr(method.decoder[0].weight.detach())  # (12, 3)
    cosines = torch.linalg.svdvals(axes[:3] @ found)
    assert float(torch.acos(cosines.clamp(max=1.0)).max()) < 1e-3
    discarded = singular[3:].square().sum() / 64
    torch.testing.assert_close(loss.detach(), discarded / 12, rtol=1e-6, atol=0)


def damaged_share(images: Tensor, seen: Tensor) -> float:
    return float((images != seen).any(1).double().mean())


@pytest.mark.parametrize("kind", ["pixel_mask", "block_mask", "salt_pepper"])
def test_a_share_of_pixels_is_damaged_in_all_channels_and_the_target_stays_as_it_is(kind: str) -> None:
    images = 0.1 + 0.8 * rand(64, 3, 32, 32)
    before = images.clone()
    method = tiny(image_size=32, corruption=kind, strength=0.3)
    seen = method.corrupted(images)
    count = images.numel() / 3 / (16 if kind == "block_mask" else 1)  # independent draws
    assert abs(damaged_share(images, seen) - 0.3) < 3 * math.sqrt(0.3 * 0.7 / count)
    assert torch.equal(images, before)
    changed = (images != seen).any(1, keepdim=True).expand_as(images)
    values = seen[changed]
    if kind == "salt_pepper":
        assert set(values.tolist()) == {0.0, 1.0}
        assert abs(float(values.mean()) - 0.5) < 3 * 0.5 / math.sqrt(len(values) / 3)
    else:
        assert set(values.tolist()) == {0.0}
    assert damaged_share(images, tiny(corruption=kind, strength=1.0).corrupted(images)) == 1.0


def test_blocks_are_whole_and_are_cut_at_the_edge() -> None:
    images = 0.1 + 0.8 * rand(8, 3, 10, 10)
    seen = tiny(image_size=10, corruption="block_mask", strength=0.5, block_size=4).corrupted(images)
    black = (seen == 0).all(1)  # (N, S, S)
    for rows in (slice(0, 4), slice(4, 8), slice(8, 10)):
        for columns in (slice(0, 4), slice(4, 8), slice(8, 10)):
            block = black[:, rows, columns].flatten(1)
            assert torch.equal(block.all(1), block.any(1))
    assert 0 < float(black.double().mean()) < 1


def test_gaussian_noise_has_the_deviation_asked_for_and_is_not_clamped() -> None:
    images = rand(64, 3, 32, 32)
    seen = tiny(corruption="gaussian", strength=0.2).corrupted(images)
    noise = (seen - images).flatten()
    assert abs(float(noise.mean())) < 4 * 0.2 / math.sqrt(len(noise))
    assert float(noise.std()) == pytest.approx(0.2, rel=0.01)
    assert float(seen.min()) < 0.0
    assert float(seen.max()) > 1.0


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_corruption_is_fresh_in_training_and_absent_from_evaluation(kind: str) -> None:
    method, images = tiny(corruption=kind), rand(4, 3, 8, 8).float()
    assert not torch.equal(method.corrupted(images), method.corrupted(images))
    method.eval()
    draws = method.noise.draws
    assert torch.equal(method.corrupted(images), images)
    assert torch.equal(method.features(images), method.features(images))
    assert method.noise.draws == draws


def corrupted_part(images: Tensor, kind: str) -> Tensor:
    method = tiny(corruption=kind)
    return method.corrupted(images.chunk(torch.distributed.get_world_size())[torch.distributed.get_rank()])


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_two_processes_damage_the_images_as_one_does(kind: str, pair: Pair) -> None:
    images = rand(6, 3, 8, 8)
    parts = pair.run(corrupted_part, images, kind)
    assert torch.equal(torch.cat(list(parts)), tiny(corruption=kind).corrupted(images))


def test_nothing_goes_around_the_code() -> None:
    method, images = tiny().eval(), rand(4, 3, 8, 8).float()
    method.to_code.weight.data.zero_()
    drawn = method.decoder(method.projection(images))
    assert torch.equal(drawn[0], drawn[1])
    norms = [m for m in method.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms
    assert all(type(m) is SyncBatchNorm for m in norms)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("corruption", [None, "salt_pepper"])
def test_pictures_show_what_came_in_and_what_was_drawn_of_it(loss: str, corruption: str | None) -> None:
    method, images = tiny(loss=loss, corruption=corruption).eval(), rand(3, 3, 8, 8).float()
    state, random = method.noise.get_extra_state(), torch.get_rng_state()
    with torch.no_grad():
        first, second = method.pictures(images)["reconstruction"], method.pictures(images)["reconstruction"]
    assert torch.equal(method.noise.get_extra_state(), state)
    assert torch.equal(torch.get_rng_state(), random)
    assert len(first) == (2 if corruption is None else 3)
    assert all(row.shape == images.shape for row in first)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(first[0], images)
    if corruption is not None:
        assert set(first[1][first[1] != images].tolist()) == {0.0, 1.0}
    with torch.no_grad():
        drawn = method.decoder(method.projection(first[-2]))
    torch.testing.assert_close(first[-1], method.pixels(drawn, images))


@pytest.mark.parametrize("image_size", [32, 100])
def test_gray_images_of_any_side_train(image_size: int) -> None:
    method = Autoencoder(
        Flat(image_size**2), image_size=image_size, channels=1, dim=4, width=2, corruption="block_mask"
    )
    assert float(method(batch_of(rand(2, 1, image_size, image_size).float()))["loss"]) > 0


def test_embeddings_are_the_codes() -> None:
    method, images = tiny(), rand(4, 3, 8, 8).float()
    method(batch_of(images))
    (codes,) = method.embeddings
    assert codes.shape == (4, 4)
    assert not codes.requires_grad
    torch.testing.assert_close(codes, method.projection(images).detach())


def test_peak_signal_to_noise_ratio_is_the_mean_over_images() -> None:
    images = torch.zeros(2, 3, 4, 4)
    drawn = torch.stack([torch.full((3, 4, 4), 0.1), torch.full((3, 4, 4), 0.01)])
    assert float(psnr(drawn, images)) == pytest.approx((20 + 40) / 2)
    assert float(psnr(images, images)) == pytest.approx(100)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.full((2, 3, 8, 8), -0.5), r"values from -0\.5 to -0\.5.*views\.normalize=false"),
        (torch.full((2, 3, 8, 8), 1.5), r"values from 1\.5 to 1\.5"),
        (torch.zeros(2, 3, 16, 16), r"shape \(3, 16, 16\), but the decoder generates images of \(3, 8, 8\)"),
        (torch.zeros(2, 1, 8, 8), r"shape \(1, 8, 8\)"),
    ],
)
def test_images_that_cannot_be_drawn_are_refused_at_the_first_step(images: Tensor, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny()(batch_of(images))
    check_images(torch.rand(2, 3, 8, 8), (3, 8, 8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "ssim"}, "loss is 'ssim'.*mse, l1, bce, patch"),
        ({"loss": "patch", "patch_size": 3}, "patch_size is 3.*divide the 8"),
        ({"loss": "patch", "patch_size": 1}, "patch_size is 1.*at least 2"),
        ({"patch_size": 0}, "patch_size is 0"),
        ({"corruption": "blur"}, "corruption is 'blur'.*pixel_mask"),
        ({"corruption": "gaussian", "strength": -0.1}, r"strength is -0\.1.*standard deviation"),
        ({"corruption": "pixel_mask", "strength": 1.5}, r"strength is 1\.5.*fraction of the pixels"),
        ({"corruption": "salt_pepper", "strength": math.nan}, "strength is nan"),
        ({"corruption": "block_mask", "block_size": 0}, "block_size is 0"),
        ({"code_from": "pooled"}, "code_from is 'pooled'.*features, map"),
        ({"code_from": "map"}, r"TinyNet has no stages\(images\)"),
        ({"dim": 0}, "dim is 0"),
        ({"image_size": 4}, "image_size is 4"),
    ],
)
def test_impossible_values_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


def test_stronger_noise_than_one_is_allowed_where_it_means_something() -> None:
    images = rand(2, 3, 8, 8)
    seen = tiny(corruption="gaussian", strength=2.0).corrupted(images)
    assert float(F.mse_loss(seen, images)) > 1.0
