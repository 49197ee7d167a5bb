from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from sslcli.errors import ConfigError
from sslcli.methods.base import Batch
from sslcli.methods.bigan import BiGAN, Discriminator
from sslcli.methods.gan import discriminator_loss, generator_loss, pixels
from tiny import TinyNet

SMALL = {"image_size": 8, "dim": 4, "width": 4, "discriminator_width": 4, "hidden": 8}


def tiny(**changes: object) -> BiGAN:
    torch.manual_seed(0)
    return BiGAN(TinyNet(), **(SMALL | changes)).double()


def batch(num_images: int = 6, *, seed: int = 0) -> Batch:
    images = torch.rand(num_images, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return Batch([images], torch.arange(num_images), torch.zeros(num_images, dtype=torch.long))


def players(method: BiGAN) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    others = [*method.encoder.parameters(), *method.generator.parameters()]
    return list(method.discriminator.parameters()), others


@pytest.mark.parametrize("unary", [False, True])
def test_a_discriminator_that_knows_nothing_costs_both_two_log_two_a_logit(unary: bool) -> None:
    method = tiny(unary=unary)
    for layer in (method.discriminator.of_pairs[2], *method.discriminator.unary):
        torch.nn.utils.parametrize.remove_parametrizations(layer, "weight")
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    found = method(batch())
    logits = 3 if unary else 1
    assert float(found["loss_d"]) == pytest.approx(2 * logits * math.log(2))
    assert float(found["loss_g"]) == pytest.approx(2 * logits * math.log(2))


@pytest.mark.parametrize("loss", ["logistic", "hinge"])
def test_neither_player_gets_a_gradient_from_the_loss_of_the_other(loss: str) -> None:
    method = tiny(loss=loss, r1=1.0)
    discriminator, others = players(method)
    found = method(batch())
    for name, mine, theirs in [
        ("loss_d", discriminator, others),
        ("r1", discriminator, others),
        ("loss_g", others, discriminator),
    ]:
        gradients = torch.autograd.grad(found[name], [*mine, *theirs], retain_graph=True, allow_unused=True)
        assert all(g is None for g in gradients[len(mine) :]), name
        if name != "r1":  # which biases at the end do not feel
            assert all(g is not None for g in gradients[: len(mine)]), name
        assert any(g is not None and g.any() for g in gradients[: len(mine)]), name
    to_encoder = torch.autograd.grad(found["loss_g"], list(method.encoder.parameters()))
    assert all(g.any() for g in to_encoder)


@pytest.mark.parametrize("loss", ["logistic", "hinge"])
@pytest.mark.parametrize("unary", [False, True])
def test_one_backward_is_two(loss: str, unary: bool) -> None:
    method = tiny(loss=loss, unary=unary)
    twin, images = copy.deepcopy(method), batch().views[0]
    method(batch())["loss"].backward()

    prior = twin.noise.normal(6, 4, device=torch.device("cpu")).double()
    codes, drawn = twin.encoder(images), pixels(twin.generator(prior))
    opponent = twin.discriminator
    real, fake = opponent(torch.cat([images, drawn.detach()]), torch.cat([codes.detach(), prior])).chunk(2)
    discriminator_loss(real, fake, kind=loss).backward()
    singular = {name: buffer.clone() for name, buffer in opponent.named_buffers()}
    opponent.requires_grad_(False)
    real, fake = opponent(torch.cat([images, drawn]), torch.cat([codes, prior])).chunk(2)
    (generator_loss(-real, kind=loss) + generator_loss(fake, kind=loss)).backward()

    expected = dict(twin.named_parameters())
    for name, parameter in method.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, msg=lambda text, name=name: f"{name}: {text}")
    # One step of the power iteration, whatever the number of passes.
    assert all(torch.equal(buffer, singular[name]) for name, buffer in method.discriminator.named_buffers())
    assert singular


def test_every_weight_of_the_discriminator_has_spectral_norm_one_and_no_pair_sees_another() -> None:
    net = Discriminator(4, image_size=8, channels=3, width=4, hidden=8, unary=True).double()
    layers = [part for part in net.modules() if isinstance(part, (nn.Conv2d, nn.Linear))]
    assert not [part for part in net.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    images, codes = batch().views[0], torch.randn(6, 4, dtype=torch.float64)
    for _ in range(200):
        net(images, codes)
    net.eval()
    for layer in layers:
        largest = torch.linalg.matrix_norm(layer.weight.flatten(1), 2)
        assert float(largest) == pytest.approx(1.0, abs=0.02)
    scores = net(images, codes)
    assert scores.shape == (6, 3)
    torch.testing.assert_close(net(images[:2], codes[:2]), scores[:2])


@pytest.mark.parametrize("image_size", [8, 32, 100])
def test_the_discriminator_takes_images_of_any_side(image_size: int) -> None:
    net = Discriminator(4, image_size=image_size, channels=1, width=2, hidden=4, unary=False)
    assert net(torch.rand(2, 1, image_size, image_size), torch.randn(2, 4)).shape == (2, 1)


def test_running_statistics_are_of_what_the_networks_are_for() -> None:
    method = tiny()
    twin, images = copy.deepcopy(method), batch().views[0]
    method(batch())
    twin.encoder(images)
    twin.generator(twin.noise.normal(6, 4, device=torch.device("cpu")).double())
    for part in ("encoder", "generator"):
        expected = dict(getattr(twin, part).named_buffers())
        for name, buffer in getattr(method, part).named_buffers():
            torch.testing.assert_close(buffer, expected[name])


def test_what_is_evaluated_is_the_average_of_what_learns() -> None:
    method, images = tiny(momentum=0.5), batch().views[0]
    expected = method.backbone.conv.weight.detach().clone()
    for step in range(3):
        with torch.no_grad():
            for parameter in method.encoder.parameters():
                parameter.add_(torch.randn_like(parameter))
        method.encoder(images)
        method.after_step(step / 3)
        momentum = min(0.5, (2 + step) / (11 + step))
        expected = momentum * expected + (1 - momentum) * method.encoder[0].conv.weight.detach()
        torch.testing.assert_close(method.backbone.conv.weight, expected)
    assert not any(parameter.requires_grad for parameter in method.backbone.parameters())
    torch.testing.assert_close(method.backbone.norm.running_mean, method.encoder[0].norm.running_mean)
    method.eval()
    assert torch.equal(method.features(images), method.backbone(images))
    assert torch.equal(method.projection(images), method.to_code(method.backbone(images)))


def test_reconstruction_is_the_distance_to_what_is_drawn_of_the_code() -> None:
    method, images = tiny(), batch().views[0]
    found = method(batch())["reconstruction"]
    drawn = pixels(copy.deepcopy(method.generator)(method.embeddings[0]))
    expected = torch.stack([((a - b) ** 2).mean().sqrt() for a, b in zip(drawn, images, strict=True)]).mean()
    torch.testing.assert_close(found, expected.detach())


def test_the_penalty_comes_every_so_many_steps_and_counts_for_them_all() -> None:
    method = tiny(r1=2.0, r1_every=3)
    always = copy.deepcopy(method)
    always.r1_every = 1
    found = []
    for step in range(6):
        found.append(float(method(batch())["r1"]))
        method.after_step(step / 6)
    assert [value > 0 for value in found] == [True, False, False, True, False, False]
    assert found[0] == pytest.approx(3 * float(always(batch())["r1"]))
    assert "r1" not in tiny()(batch())


def test_codes_are_the_embeddings_and_pictures_repeat_themselves() -> None:
    method, images = tiny(), batch().views[0]
    method(batch())
    assert method.embeddings[0].shape == (6, 4)
    assert not method.embeddings[0].requires_grad
    method.eval()
    draws, random = method.noise.draws, torch.get_rng_state()
    with torch.no_grad():
        first, second = method.pictures(images), method.pictures(images)
    assert (method.noise.draws, torch.equal(torch.get_rng_state(), random)) == (draws, True)
    assert {name: len(rows) for name, rows in first.items()} == {"reconstruction": 2, "samples": 4}
    for name, rows in first.items():
        assert all(torch.equal(a, b) for a, b in zip(rows, second[name], strict=True))
        assert all(row.shape == images.shape and row.min() >= 0 and row.max() <= 1 for row in rows)
    assert torch.equal(first["reconstruction"][0], images)
    assert not torch.equal(first["samples"][0], first["samples"][1])


def refused(images: Tensor) -> None:
    tiny()(Batch([images], torch.arange(len(images)), torch.zeros(len(images), dtype=torch.long)))


def test_normalized_images_are_refused_at_the_first_step() -> None:
    with pytest.raises(ConfigError, match=r"values from .*views\.normalize=false"):
        refused(2 * torch.rand(2, 3, 8, 8, dtype=torch.float64) - 1)
    with pytest.raises(ConfigError, match=r"generates images of \(3, 8, 8\)"):
        refused(torch.rand(2, 3, 16, 16, dtype=torch.float64))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"momentum": 1.5}, r"momentum is 1\.5"),
        ({"hidden": 0}, "hidden is 0"),
        ({"discriminator_width": 0}, "discriminator_width is 0"),
        ({"loss": "mse"}, "loss is 'mse'"),
    ],
)
def test_impossible_values_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**changes)
