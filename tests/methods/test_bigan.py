from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from processes import Pair
from sslcli.distributed.collectives import rank
from sslcli.errors import ConfigError
from sslcli.methods.base import Batch
from sslcli.methods.bigan import BiGAN, Discriminator, reconstruction_errors
from sslcli.methods.gan import discriminator_loss, generator_loss, pixels
from sslcli.nn.batch_norm import SyncBatchNorm
from sslcli.nn.conditional_gan import ConditionalDiscriminator
from tiny import TinyNet

SMALL = {"image_size": 8, "dim": 4, "width": 4, "discriminator_width": 4, "hidden": 8}


def tiny(**changes: object) -> BiGAN:
    torch.manual_seed(0)
    return BiGAN(TinyNet(), **(SMALL | changes)).double()


def batch(num_images: int = 6, *, seed: int = 0, side: int = 8) -> Batch:
    images = torch.rand(num_images, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
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


@pytest.mark.parametrize("cycle", [0.0, 3.0])
def test_reconstruction_errors_compare_an_image_with_its_own_and_with_other_reconstructions(cycle: float) -> None:
    method, images = tiny(cycle=cycle), batch().views[0]
    found = method(batch())
    drawn = pixels(copy.deepcopy(method.generator)(method.embeddings[0])).detach()
    errors = torch.stack([torch.stack([((x - y) ** 2).mean() for y in drawn]) for x in images])  # (N, N)
    same = errors.diagonal().mean().sqrt()
    other = errors[~torch.eye(len(images), dtype=torch.bool)].mean().sqrt()
    expected = {"reconstruction": same, "shuffled_reconstruction": other, "reconstruction_ratio": same / other}
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


def test_only_the_ratio_shows_whether_reconstructions_depend_on_their_image() -> None:
    images = torch.rand(50, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mean = reconstruction_errors(images.mean(0).expand_as(images), images)
    noisy = reconstruction_errors(images + 0.5 * (-1) ** torch.arange(8), images)
    assert float(mean["reconstruction_ratio"]) == pytest.approx(1.0)
    assert mean["reconstruction"] < noisy["reconstruction"]
    assert noisy["reconstruction_ratio"] < 0.85
    one = reconstruction_errors(images[:1] / 2, images[:1])
    assert float(one["reconstruction_ratio"]) == pytest.approx(1.0)  # there is no other image
    equal = images[:1].expand_as(images)
    assert float(reconstruction_errors(equal, equal)["reconstruction_ratio"]) < 1e-3


def part_of_errors(drawn: Tensor, images: Tensor) -> dict[str, Tensor]:
    return reconstruction_errors(drawn.chunk(2)[rank()], images.chunk(2)[rank()])


def test_reconstruction_errors_are_over_the_images_of_all_processes(pair: Pair) -> None:
    drawn, images = batch().views[0], batch(seed=1).views[0]
    expected = reconstruction_errors(drawn, images)
    for found in pair.run(part_of_errors, drawn, images):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value)


def test_the_cycle_loss_is_the_squared_error_of_reconstructions_and_reaches_encoder_and_generator_alone() -> None:
    method, images = tiny(cycle=3.0), batch().views[0]
    plain, found = tiny()(batch()), method(batch())
    assert "cycle" not in plain
    torch.testing.assert_close(found["loss"], plain["loss"] + found["cycle"])
    trained = {name: parameter for name, parameter in method.named_parameters() if parameter.requires_grad}
    gradients = torch.autograd.grad(found["cycle"], [*trained.values()], retain_graph=True, allow_unused=True)
    reached = {name.split(".")[0] for name, gradient in zip(trained, gradients, strict=True) if gradient is not None}
    assert reached == {"encoder", "generator"}
    twin = tiny()
    expected = 3.0 * (pixels(twin.generator(twin.encoder(images))) - images).square().mean()
    torch.testing.assert_close(found["cycle"], expected)
    for part in ("encoder", "generator"):
        for mine, theirs in zip(
            torch.autograd.grad(found["cycle"], [*getattr(method, part).parameters()], retain_graph=True),
            torch.autograd.grad(expected, [*getattr(twin, part).parameters()], retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(mine, theirs)


def test_a_run_without_the_new_keys_has_the_losses_that_it_had() -> None:
    method = tiny()
    assert (method.cycle, method.prior, method.code_from) == (0.0, "normal", "features")
    assert isinstance(method.discriminator, Discriminator)


class Staged(TinyNet):
    """With its one map as a stage."""

    def stages(self, images: Tensor) -> dict[str, Tensor]:
        return {"only": torch.relu(self.norm(self.conv(images)))}


def test_codes_from_the_map_are_linear_in_all_values_of_the_last_map() -> None:
    torch.manual_seed(0)
    method = BiGAN(Staged(), **SMALL, code_from="map").double()
    method(batch())["loss"].backward()
    assert all(parameter.grad is not None for parameter in method.encoder.parameters())
    method.eval()
    images = batch().views[0]
    found = method.backbone.stages(images)["only"].flatten(1)
    assert method.to_code.in_features == found.shape[1] > method.features(images).shape[1]
    torch.testing.assert_close(method.projection(images), method.to_code(found))
    with pytest.raises(ValueError, match=r"TinyNet has no stages"):
        tiny(code_from="map")


def test_codes_of_a_uniform_prior_are_bounded_and_those_of_the_encoder_too() -> None:
    method, images = tiny(prior="uniform"), batch().views[0]
    with torch.no_grad():
        for layer in (method.encoder[1], method.to_code):
            layer.weight.mul_(100)
    drawn = method.codes(torch.zeros(1000, 3, 8, 8, dtype=torch.float64))
    assert drawn.min() < -0.99
    assert drawn.max() > 0.99
    assert float(drawn.var()) == pytest.approx(1 / 3, rel=0.05)
    method(batch())
    method.eval()
    for codes in (method.embeddings[0], method.projection(images)):
        assert 0.9 < codes.detach().abs().max() <= 1
    expected = torch.tanh(method.to_code(method.backbone(images)) / 2)
    torch.testing.assert_close(method.projection(images), expected)


def test_the_official_networks_train_both_players_as_two_backward_passes_do() -> None:
    method = tiny(networks="official", image_size=16, width=8, prior="uniform")
    assert isinstance(method.discriminator, ConditionalDiscriminator)
    nn.init.normal_(method.discriminator.to_logit.weight, std=0.1)  # zero at first
    twin, given = copy.deepcopy(method), batch(side=16)
    (images,) = given.views
    method(given)["loss"].backward()

    prior = 2 * twin.noise.uniform(6, 4, device=torch.device("cpu")).double() - 1
    codes, drawn = torch.tanh(twin.encoder(images) / 2), pixels(twin.generator(prior))
    opponent = twin.discriminator
    real, fake = opponent.logits(2 * images - 1, codes.detach()), opponent.logits(2 * drawn.detach() - 1, prior)
    discriminator_loss(real, fake, kind="logistic").backward()
    opponent.requires_grad_(False)
    real, fake = opponent.logits(2 * images - 1, codes), opponent.logits(2 * drawn - 1, prior)
    (generator_loss(-real, kind="logistic") + generator_loss(fake, kind="logistic")).backward()
    expected = dict(twin.named_parameters())
    for name, parameter in method.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, msg=lambda text, name=name: f"{name}: {text}")


def test_with_the_official_networks_the_code_layer_starts_as_in_the_official_code() -> None:
    torch.manual_seed(0)
    method = BiGAN(TinyNet(), image_size=32, dim=200, networks="official", width=8, discriminator_width=4)
    assert float(method.encoder[1].weight.detach().std()) == pytest.approx(0.02, rel=0.1)
    assert torch.equal(method.encoder[1].weight, method.to_code.weight)
    norms = [m for m in method.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert all(type(m) is SyncBatchNorm for m in norms)


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
        ({"prior": "beta"}, "prior is 'beta'.*normal, uniform"),
        ({"cycle": -1.0}, r"cycle is -1\.0.*0 disables it"),
        ({"cycle": math.inf}, "cycle is inf"),
        ({"code_from": "head"}, "code_from is 'head'.*features, map"),
        ({"networks": "large"}, "networks is 'large'.*compact, official"),
        ({"networks": "official", "unary": True}, "unary is True.*networks=compact"),
        ({"networks": "official", "r1": 1.0}, r"r1 is 1\.0.*networks=compact"),
    ],
)
def test_impossible_values_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**changes)
