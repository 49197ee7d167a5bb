from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from sslcli.backbones.dcgan import DCGANNet
from sslcli.methods.base import Batch
from sslcli.methods.dcgan import DCGAN, pooled_maps
from sslcli.methods.gan import discriminator_loss, generator_loss, gradient_penalty, pixels
from tiny import TinyNet


def tiny(**changes: object) -> DCGAN:
    torch.manual_seed(0)
    backbone = DCGANNet(image_size=16, width=2)
    return DCGAN(backbone, **({"image_size": 16, "dim": 4, "width": 4} | changes)).double()


def batch(num_images: int = 6) -> Batch:
    images = torch.rand(num_images, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return Batch([images], torch.arange(num_images), torch.zeros(num_images, dtype=torch.long))


def test_a_discriminator_that_knows_nothing_costs_two_log_two_and_one() -> None:
    method = tiny()
    nn.init.zeros_(method.to_logit.weight)
    nn.init.zeros_(method.to_logit.bias)
    found = method(batch())
    assert float(found["loss_d"]) == pytest.approx(2 * math.log(2))
    assert float(found["loss_g"]) == pytest.approx(math.log(2))


@pytest.mark.parametrize("loss", ["logistic", "hinge"])
def test_one_backward_is_two_and_real_and_drawn_images_are_batches_of_their_own(loss: str) -> None:
    method = tiny(loss=loss)
    twin, images = copy.deepcopy(method), batch().views[0]
    found = method(batch())
    discriminator = [*method.backbone.parameters(), *method.to_logit.parameters()]
    generator = list(method.generator.parameters())
    for name, theirs in [("loss_d", generator), ("loss_g", discriminator)]:
        gradients = torch.autograd.grad(found[name], theirs, retain_graph=True, allow_unused=True)
        assert all(g is None for g in gradients), name
    found["loss"].backward()

    drawn = pixels(twin.generator(twin.noise.normal(6, 4, device=torch.device("cpu")).double()))
    real = twin.to_logit(twin.backbone(images))
    statistics = {name: buffer.clone() for name, buffer in twin.backbone.named_buffers()}
    fake = twin.to_logit(twin.backbone(drawn.detach()))
    discriminator_loss(real, fake, kind=loss).backward()
    twin.backbone.requires_grad_(False)
    twin.to_logit.requires_grad_(False)
    generator_loss(twin.to_logit(twin.backbone(drawn)), kind=loss).backward()

    expected = dict(twin.named_parameters())
    for name, parameter in method.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, msg=lambda text, name=name: f"{name}: {text}")
    # What features are taken by is known of real images alone.
    assert statistics
    assert all(torch.equal(buffer, statistics[name]) for name, buffer in method.backbone.named_buffers())


def test_features_are_the_largest_values_of_each_part_of_each_map() -> None:
    maps = {"wide": torch.rand(2, 3, 8, 8), "small": torch.rand(2, 5, 2, 2)}
    found = pooled_maps(maps, 4)
    wide = maps["wide"].unflatten(3, (4, 2)).unflatten(2, (4, 2)).amax((3, 5)).flatten(1)
    row = torch.cat([wide, maps["small"].flatten(1)], 1)
    assert found.shape == (2, 3 * 16 + 5 * 4)
    torch.testing.assert_close(found, row / row.norm(dim=1, keepdim=True))


@pytest.mark.parametrize("pool", [1, 4])
def test_features_are_pooled_from_every_stage_of_the_backbone(pool: int) -> None:
    method, images = tiny(pool=pool).eval(), batch().views[0]
    with torch.no_grad():
        found = method.features(images)
        torch.testing.assert_close(found, pooled_maps(method.backbone.stages(images), pool))
    sides = {"block1": 8, "block2": 4, "block3": 2}
    channels = {"block1": 2, "block2": 4, "block3": 8}
    assert found.shape == (6, sum(channels[name] * min(pool, side) ** 2 for name, side in sides.items()))
    torch.testing.assert_close(found.norm(dim=1), torch.ones(6, dtype=torch.float64))


def test_the_penalty_looks_at_each_image_by_itself_and_leaves_the_mode() -> None:
    method = tiny(r1=2.0, r1_every=4)
    found = method(batch())["r1"]
    assert all(part.training for part in method.backbone.modules())
    reference = copy.deepcopy(method).eval()  # the running statistics are those of the pass over real images
    expected = gradient_penalty(lambda x: reference.to_logit(reference.backbone(x)), batch().views[0])
    torch.testing.assert_close(found, 2.0 * 4 * expected)
    gradients = torch.autograd.grad(found, list(method.generator.parameters()), allow_unused=True, retain_graph=True)
    assert all(g is None for g in gradients)
    assert torch.autograd.grad(found, method.to_logit.weight)[0].any()


def test_weights_start_as_in_the_paper() -> None:
    torch.manual_seed(0)
    method = DCGAN(DCGANNet(image_size=32, width=16), image_size=32, width=64)
    for weight in (parameter for parameter in method.parameters() if parameter.ndim > 1):
        assert float(weight.detach().std()) == pytest.approx(0.02, rel=0.15)
    scales = torch.cat([m.weight.detach() for m in method.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)])
    assert float(scales.mean()) == pytest.approx(1.0, abs=0.01)
    assert float(scales.std()) == pytest.approx(0.02, rel=0.3)


def test_pictures_are_drawn_of_the_same_codes_each_time() -> None:
    method, images = tiny().eval(), batch().views[0]
    with torch.no_grad():
        first, second = method.pictures(images)["samples"], method.pictures(images)["samples"]
    assert len(first) == 4
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(row.shape == images.shape and row.min() >= 0 and row.max() <= 1 for row in first)
    assert method.noise.draws == 0


def test_a_backbone_without_maps_and_impossible_values_are_refused() -> None:
    with pytest.raises(ValueError, match=r"TinyNet has no stages\(images\): choose a resnet, small, vit or timm"):
        DCGAN(TinyNet(), image_size=16)
    with pytest.raises(ValueError, match="pool is 0"):
        tiny(pool=0)
