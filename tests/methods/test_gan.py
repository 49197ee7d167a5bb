from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from golden_cases import Case, golden_cases
from processes import Pair
from sslcli.distributed.collectives import rank
from sslcli.engine.optim import parameter_groups
from sslcli.methods.dcgan import DCGAN
from sslcli.methods.gan import call_on_buffer_copies, discriminator_loss, distance, generator_loss, gradient_penalty
from sslcli.nn.batch_norm import SyncBatchNorm
from tiny import TinyNet


class Mapped(TinyNet):
    """With its one map as a stage."""

    def stages(self, images: Tensor) -> dict[str, Tensor]:
        return {"only": torch.relu(self.norm(self.conv(images)))}


def tiny(**changes: object) -> DCGAN:
    return DCGAN(Mapped(), **({"image_size": 8, "dim": 4, "width": 4} | changes))


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@golden_cases("gan")
def test_losses_and_gradients_equal_the_official_code(case: Case) -> None:
    real, fake = (case.inputs[name].requires_grad_() for name in ("real", "fake"))
    loss_d = discriminator_loss(real, fake, kind="logistic")
    case.check(loss_d, "loss_d")
    for gradient, name in zip(torch.autograd.grad(loss_d, (real, fake)), ("grad_real_d", "grad_fake_d"), strict=True):
        case.check(gradient, name)
    loss_g = generator_loss(fake, kind="logistic")
    case.check(loss_g, "loss_g")
    case.check(torch.autograd.grad(loss_g, fake)[0], "grad_fake_g")
    # The discriminator's half for drawn images is the game's value, of which that half is what a generator minimizes.
    never_wrong = torch.full_like(real, 1e4)
    case.check(-discriminator_loss(never_wrong, fake, kind="logistic"), "loss_g_minimax")


def test_logistic_losses_are_cross_entropies_with_labels_one_and_zero_and_the_other_way_round() -> None:
    real, fake = 3 * randn(6, 1), 3 * randn(6, 1, seed=1)
    one, zero = torch.ones_like(real), torch.zeros_like(real)
    bce = F.binary_cross_entropy_with_logits
    torch.testing.assert_close(discriminator_loss(real, fake, kind="logistic"), bce(real, one) + bce(fake, zero))
    both = generator_loss(-real, kind="logistic") + generator_loss(fake, kind="logistic")
    torch.testing.assert_close(both, bce(real, zero) + bce(fake, one))


def test_hinge_losses_are_those_of_the_formula() -> None:
    real, fake = torch.tensor([[2.0, 0.5], [-1.0, 1.0]]), torch.tensor([[-3.0, 0.0], [0.5, -1.0]])
    assert float(discriminator_loss(real, fake, kind="hinge")) == pytest.approx((0.5 + 2.0 + 1.0 + 1.5) / 2)
    assert float(generator_loss(fake, kind="hinge")) == pytest.approx((3.0 - 0.5 + 1.0) / 2)
    assert float(generator_loss(-real, kind="hinge")) == pytest.approx((2.5 + 0.0) / 2)


@pytest.mark.parametrize("kind", ["logistic", "hinge"])
def test_losses_of_half_precision_logits_are_computed_in_float32(kind: str) -> None:
    logits = randn(4, 1).bfloat16()
    assert discriminator_loss(logits, logits, kind=kind).dtype == torch.float32
    assert generator_loss(logits, kind=kind).dtype == torch.float32


def test_against_the_best_discriminator_a_linear_encoder_inverts_a_linear_generator() -> None:
    """Of x ~ N(0, 4): D is the log ratio of the two joint densities, both smoothed a little so that they exist."""
    deviation, noise = 2.0, 0.1
    weights = torch.tensor([0.4, 1.5], dtype=torch.float64, requires_grad=True)  # of E and G
    descent = torch.optim.Adam([weights], lr=0.02, betas=(0.5, 0.999))
    generator = torch.Generator().manual_seed(0)

    for _ in range(400):
        x, z, more_x, more_z = torch.randn(4, 256, generator=generator, dtype=torch.float64)
        x, more_x, more_z = deviation * x, deviation * noise * more_x, noise * more_z
        e, g = weights
        real = torch.stack([x, e * x + more_z], 1)
        fake = torch.stack([g * z + more_x, z], 1)
        e, g = weights.tolist()
        variance, shared = deviation**2, e * deviation**2
        of_real = torch.tensor([[variance, shared], [shared, e * shared + noise**2]])
        of_fake = torch.tensor([[g**2 + (deviation * noise) ** 2, g], [g, 1.0]])
        form = of_fake.double().inverse() - of_real.double().inverse()
        ratio = (of_fake.double().det() / of_real.double().det()).log()
        scores = [((pairs @ form * pairs).sum(1, keepdim=True) + ratio) / 2 for pairs in (real, fake)]
        loss = generator_loss(-scores[0], kind="logistic") + generator_loss(scores[1], kind="logistic")
        descent.zero_grad()
        loss.backward()
        descent.step()
    found_e, found_g = weights.tolist()
    assert abs(found_e * found_g - 1) < 0.05
    assert found_g == pytest.approx(deviation, rel=0.1)


@pytest.mark.parametrize("learn", [False, True])
def test_aside_leaves_the_buffers_and_lets_a_gradient_to_the_inputs(learn: bool) -> None:
    net, images = TinyNet().double(), randn(4, 3, 8, 8).requires_grad_()
    twin = TinyNet().double()
    twin.load_state_dict(net.state_dict())
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    out = call_on_buffer_copies(net, images, learn=learn)
    torch.testing.assert_close(out, twin(images))
    assert all(torch.equal(buffer, before[name]) for name, buffer in net.named_buffers())
    assert not torch.equal(twin.norm.running_mean, before["norm.running_mean"])
    out.square().sum().backward()
    assert images.grad is not None
    assert images.grad.any()
    assert [parameter.grad is not None for parameter in net.parameters()] == [learn] * len(list(net.parameters()))


def test_the_penalty_of_a_linear_discriminator_is_half_its_squared_length() -> None:
    weight = randn(12).requires_grad_()
    penalty = gradient_penalty(lambda x: (x.flatten(1) @ weight)[:, None], randn(5, 3, 2, 2, seed=1))
    torch.testing.assert_close(penalty, weight.square().sum() / 2)
    penalty.backward()
    torch.testing.assert_close(weight.grad, weight.detach())


def energy(x: list[float], y: list[float]) -> float:
    """The same by the definition, element by element."""
    between = sum(abs(a - b) for a in x for b in y) / (len(x) * len(y))
    within = [sum(abs(a - b) for a in v for b in v) / (len(v) * (len(v) - 1)) for v in (x, y)]
    return 2 * between - sum(within)


def plain(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).view(-1, 1, 1, 1).expand(-1, 1, 8, 8)


def test_distance_is_the_energy_distance_of_the_colors_of_squares() -> None:
    x, y = [0.1, 0.4, 0.9], [0.3, 0.8, 0.7]
    assert float(distance(plain(y), plain(x))) == pytest.approx(energy(x, y))
    with torch.no_grad():
        images = torch.rand(400, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        same, dull = distance(images[:200], images[200:]), distance(images[:200] / 4 + 0.375, images[200:])
    assert abs(float(same)) < 0.005
    assert float(dull) > 0.02


def part_of_distance(drawn: Tensor, images: Tensor) -> Tensor:
    return distance(drawn.chunk(2)[rank()], images.chunk(2)[rank()])


def test_distance_is_over_the_images_of_all_processes(pair: Pair) -> None:
    drawn, images = randn(6, 3, 8, 8), randn(6, 3, 8, 8, seed=1)
    for found in pair.run(part_of_distance, drawn, images):
        torch.testing.assert_close(found, distance(drawn, images))


@pytest.mark.parametrize(("prior", "bound", "variance"), [("normal", math.inf, 1.0), ("uniform", 1.0, 1 / 3)])
def test_codes_and_samples_are_drawn_from_the_prior(prior: str, bound: float, variance: float) -> None:
    method = tiny(prior=prior)
    codes = method.codes(torch.zeros(2000, 3, 8, 8))
    assert codes.abs().max() <= bound
    assert float(codes.mean()) == pytest.approx(0.0, abs=0.05)
    assert float(codes.var()) == pytest.approx(variance, rel=0.05)
    drawn: list[Tensor] = []

    def generator(given: Tensor) -> Tensor:
        drawn.append(given)
        return torch.zeros(len(given), 3, 8, 8)

    method.samples(generator, torch.zeros(500, 3, 8, 8))  # type: ignore[arg-type]
    assert drawn[0].abs().max() <= bound
    assert float(drawn[0].var()) == pytest.approx(variance, rel=0.05)


def test_groups_hold_every_parameter_once_and_the_discriminator_has_its_own_rate() -> None:
    method = tiny(discriminator_lr=0.25)
    groups = parameter_groups(method, weight_decay=0.1)
    found = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(found) == sorted(id(parameter) for parameter in method.parameters())
    rates = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    players = {"backbone": 0.25, "to_logit": 0.25, "generator": 1.0}
    assert all(rates[id(p)] == players[name.partition(".")[0]] for name, p in method.named_parameters())
    optimizer = torch.optim.Adam(groups, lr=1.0, weight_decay=0.1)
    for group in optimizer.param_groups:
        assert {parameter.ndim > 1 for parameter in group["params"]} == {group["weight_decay"] == 0.1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "wasserstein"}, "loss is 'wasserstein'.*logistic, hinge"),
        ({"prior": "beta"}, "prior is 'beta'.*normal, uniform"),
        ({"r1": -1.0}, r"r1 is -1\.0.*at least 0"),
        ({"r1": math.nan}, "r1 is nan"),
        ({"r1_every": 0}, "r1_every is 0"),
        ({"discriminator_lr": 0.0}, r"discriminator_lr is 0\.0.*positive"),
        ({"dim": 0}, "dim is 0"),
        ({"width": 0}, "width is 0"),
        ({"image_size": 4}, "image_size is 4"),
    ],
)
def test_impossible_values_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


def test_every_norm_sees_the_batch_of_all_processes() -> None:
    norms = [m for m in tiny().modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms
    assert all(type(m) is SyncBatchNorm for m in norms)
