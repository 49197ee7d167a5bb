from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from golden_cases import Case, golden_cases
from processes import Pair
from sslcli.errors import ConfigError
from sslcli.methods.autoencoder import Autoencoder
from sslcli.methods.base import Batch
from sslcli.methods.vae import (
    VAE,
    Posterior,
    active_units,
    bernoulli_nll,
    divergence_loss,
    reconstruction_loss,
    squared_error,
)
from sslcli.nn.batch_norm import SyncBatchNorm
from tiny import TinyNet

FLOAT64 = torch.float64


def tiny(**changes: object) -> VAE:
    torch.manual_seed(0)
    return VAE(TinyNet(), **({"image_size": 8, "dim": 4, "width": 4} | changes))


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, dtype=FLOAT64, generator=torch.Generator().manual_seed(seed))


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=FLOAT64, generator=torch.Generator().manual_seed(seed))


def batch_of(images: Tensor) -> Batch:
    return Batch([images], torch.arange(len(images)), torch.zeros(len(images), dtype=torch.long))


def silent(method: VAE) -> VAE:
    """The method with its noise patched to zero."""
    method.noise.normal = lambda *shape, device: torch.zeros(*shape, device=device)
    return method


@golden_cases("vae")
def test_terms_and_gradients_equal_the_closed_forms(case: Case) -> None:
    mean, logvar = (case.inputs[name].requires_grad_() for name in ("mu", "logvar"))
    images, drawn = case.inputs["x"], case.inputs["x_logits"].requires_grad_()
    posterior = Posterior(mean, logvar)
    case.check(posterior.divergence().sum(1), "kl_per_sample")
    divergence = divergence_loss(posterior)
    divergence.backward()
    case.check(divergence, "kl")
    case.check(mean.grad, "grad_mu")
    case.check(logvar.grad, "grad_logvar")
    case.check(posterior.sample(case.inputs["eps"]), "z")

    case.check(bernoulli_nll(drawn, images), "bce_per_sample")
    binary = reconstruction_loss(drawn, images, kind="bernoulli", sigma=None)
    binary.backward()
    case.check(binary, "recon_bce")
    case.check(drawn.grad, "grad_x_logits_bce")
    case.check(binary + divergence, "neg_elbo_bce")

    drawn.grad = None
    case.check(squared_error(drawn, images), "sse_per_sample")
    gaussian = reconstruction_loss(drawn, images, kind="gaussian", sigma=1.0)
    (2 * gaussian).backward()
    case.check(gaussian + images[0].numel() / 2 * math.log(2 * math.pi), "recon_gauss_nll")
    case.check(drawn.grad, "grad_x_logits_sse")


def test_divergence_is_that_of_torch() -> None:
    posterior = Posterior(randn(6, 5), randn(6, 5, seed=1))
    normal = Normal(posterior.mean, (0.5 * posterior.logvar).exp())
    expected = kl_divergence(normal, Normal(0.0, 1.0)).sum(1)
    torch.testing.assert_close(posterior.divergence().sum(1), expected)
    torch.testing.assert_close(divergence_loss(posterior), expected.mean())


def test_samples_estimate_the_divergence() -> None:
    posterior = Posterior(randn(1, 3), randn(1, 3, seed=1))
    samples = posterior.sample(randn(100_000, 3, seed=2))
    q, p = Normal(posterior.mean, (0.5 * posterior.logvar).exp()), Normal(0.0, 1.0)
    ratios = (q.log_prob(samples) - p.log_prob(samples)).sum(1)
    error = float(ratios.std()) / math.sqrt(len(ratios))
    assert error < 0.02
    assert abs(float(ratios.mean()) - float(divergence_loss(posterior))) < 3 * error


def test_without_divergence_and_noise_it_is_an_autoencoder() -> None:
    method = silent(tiny(beta=0.0, sigma=0.3)).double()
    plain = Autoencoder(TinyNet(), image_size=8, dim=4, width=4).double()
    plain.backbone, plain.to_code, plain.decoder = method.backbone, method.to_mean, method.decoder
    batch = batch_of(rand(6, 3, 8, 8))
    torch.testing.assert_close(method(batch)["loss"], plain(batch)["loss"] / (2 * 0.3**2))


@pytest.mark.parametrize("changes", [{"sigma": 0.5}, {"sigma": None}, {"reconstruction": "bernoulli"}])
def test_loss_is_the_evidence_bound_over_the_number_of_values(changes: dict[str, object]) -> None:
    method = tiny(beta=3.0, kl_warmup=0.0, **changes).double()
    images, noise = rand(6, 3, 8, 8), randn(6, 4)
    method.noise.normal = lambda *shape, device: noise
    found = method(batch_of(images))
    features = method.backbone(images)
    mean, logvar = method.to_mean(features), method.to_logvar(features)
    drawn = method.decoder(mean + (logvar / 2).exp() * noise)
    divergence = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum() / 6
    squares = ((drawn - images) ** 2).sum() / 6
    if changes.get("reconstruction") == "bernoulli":
        fidelity = F.binary_cross_entropy_with_logits(drawn, images, reduction="sum") / 6
    elif changes["sigma"] is None:
        fidelity = 192 / 2 * (squares / 192).log()
    else:
        fidelity = squares / (2 * 0.5**2)
    torch.testing.assert_close(found["loss"], (fidelity + 3 * divergence) / 192)
    torch.testing.assert_close(found["kl"], divergence.detach())


@pytest.mark.parametrize("sigma", [0.5, None])
@pytest.mark.parametrize("kind", ["gaussian", "bernoulli"])
def test_a_batch_repeated_has_the_same_loss(kind: str, sigma: float | None) -> None:
    drawn, images = randn(4, 3, 4, 4), rand(4, 3, 4, 4)
    mean, logvar = randn(4, 5, seed=1), randn(4, 5, seed=2)

    def loss(times: int) -> Tensor:
        rows = (value.repeat(times, *[1] * (value.ndim - 1)) for value in (drawn, images, mean, logvar))
        d, x, m, v = rows
        return reconstruction_loss(d, x, kind=kind, sigma=sigma) + divergence_loss(Posterior(m, v), free_bits=0.2)

    torch.testing.assert_close(loss(2), loss(1))


def test_the_optimal_sigma_has_the_gradient_of_the_sigma_that_fits() -> None:
    images, drawn = rand(4, 3, 4, 4), randn(4, 3, 4, 4).requires_grad_()
    best = float((drawn.detach() - images).square().mean().sqrt())
    optimal = reconstruction_loss(drawn, images, kind="gaussian", sigma=None)
    (expected,) = torch.autograd.grad(reconstruction_loss(drawn, images, kind="gaussian", sigma=best), drawn)
    (found,) = torch.autograd.grad(optimal, drawn)
    torch.testing.assert_close(found, expected)
    for sigma in (0.9 * best, 1.1 * best):  # with its constants no other sigma makes the images likelier
        other = reconstruction_loss(drawn, images, kind="gaussian", sigma=sigma) + 48 * math.log(sigma)
        assert float(other) > float(optimal) + 48 / 2
    assert math.isfinite(float(reconstruction_loss(images, images, kind="gaussian", sigma=None)))


def test_free_bits_bound_the_mean_of_each_unit() -> None:
    mean = torch.tensor([[0.0, 2.0], [0.2, 0.0]], dtype=FLOAT64, requires_grad=True)
    posterior = Posterior(mean, torch.zeros(2, 2, dtype=FLOAT64))  # divergence mean^2 / 2
    loss = divergence_loss(posterior, free_bits=0.5)
    assert float(loss) == pytest.approx(0.5 + 1.0)  # means 0.01 and 1
    loss.backward()
    assert mean.grad.tolist() == [[0.0, 1.0], [0.0, 0.0]]


def test_the_weight_of_the_divergence_rises_over_its_share_of_the_run() -> None:
    method, batch = tiny(beta=4.0, kl_warmup=0.2), batch_of(rand(4, 3, 8, 8).float())
    weights = []
    for step in range(10):
        weights.append(float(method(batch)["kl_weight"]))
        method.after_step(step / 10)
    assert weights == pytest.approx([0.0, 0.0, 2.0, *[4.0] * 7])
    assert float(tiny(beta=4.0, kl_warmup=0.0)(batch)["kl_weight"]) == 4.0
    twin = tiny(beta=4.0, kl_warmup=0.2)
    twin.load_state_dict(method.state_dict())
    assert float(twin.kl_fraction) == 1.0


def test_a_unit_is_active_whose_mean_tells_images_apart() -> None:
    spread = torch.tensor([0.0, 0.09, 0.11, 1.0], dtype=FLOAT64)  # variance is its square
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=FLOAT64)
    assert float(active_units(5 + signs[:, None] * spread)) == 2.0
    method = tiny()
    method.to_mean.weight.data.zero_()
    assert float(method(batch_of(rand(4, 3, 8, 8).float()))["active_units"]) == 0.0
    method.to_mean.weight.data.normal_(std=100.0)
    assert float(method(batch_of(rand(4, 3, 8, 8).float()))["active_units"]) == 4.0


def test_the_posterior_is_sampled_in_training_and_never_in_evaluation() -> None:
    method, batch = tiny(), batch_of(rand(4, 3, 8, 8).float())
    draws = method.noise.draws
    assert not torch.equal(method(batch)["loss"], method(batch)["loss"])
    assert method.noise.draws == draws + 2
    method.eval()
    images, random = batch.views[0], torch.get_rng_state()
    for call in (method.features, method.projection, lambda x: method(batch_of(x))["loss"]):
        assert torch.equal(call(images), call(images))
    torch.testing.assert_close(method.projection(images), method.to_mean(method.backbone(images)))
    assert method.noise.draws == draws + 2
    assert torch.equal(torch.get_rng_state(), random)


def test_extreme_variances_stay_finite() -> None:
    method, images = tiny(), rand(4, 3, 8, 8).float()
    for bias, bound in ((1e4, 10.0), (-1e4, -10.0)):
        nn.init.constant_(method.to_logvar.bias, bias)
        assert set(method.posterior(images).logvar.flatten().tolist()) == {bound}
        assert math.isfinite(float(method(batch_of(images))["loss"]))


@pytest.mark.parametrize("reconstruction", ["gaussian", "bernoulli"])
def test_pictures_show_reconstructions_from_the_mean_and_samples_of_the_prior(reconstruction: str) -> None:
    method, images = tiny(reconstruction=reconstruction).eval(), rand(3, 3, 8, 8).float()
    random = torch.get_rng_state()
    with torch.no_grad():
        found, again = method.pictures(images), method.pictures(images)
        drawn = method.decoder(method.projection(images))
    assert torch.equal(torch.get_rng_state(), random)
    original, reconstructed = found["reconstruction"]
    assert torch.equal(original, images)
    torch.testing.assert_close(reconstructed, drawn.sigmoid() if reconstruction == "bernoulli" else drawn)
    assert [row.shape for row in found["samples"]] == [images.shape] * 2
    assert not torch.equal(*found["samples"])
    assert all(torch.equal(a, b) for name in found for a, b in zip(found[name], again[name], strict=True))


def losses_of_a_part(rows: list[Tensor], free_bits: float, sigma: float | None) -> list[Tensor]:
    """Loss, gradients to be averaged, and active units of this process's half."""
    drawn, images, mean, logvar = (
        value.chunk(torch.distributed.get_world_size())[torch.distributed.get_rank()].clone() for value in rows
    )
    return terms(drawn, images, mean, logvar, free_bits, sigma)


def terms(*values: Any) -> list[Tensor]:
    *rows, free_bits, sigma = values
    drawn, images, mean, logvar = rows
    for value in (drawn, mean, logvar):
        value.requires_grad_()
    loss = reconstruction_loss(drawn, images, kind="gaussian", sigma=sigma)
    loss = loss + divergence_loss(Posterior(mean, logvar), free_bits=free_bits)
    loss.backward()
    return [loss.detach(), drawn.grad, mean.grad, logvar.grad]


@pytest.mark.parametrize(("free_bits", "sigma"), [(0.0, 0.5), (0.0, None), (0.6, None)])
def test_two_processes_compute_the_loss_and_gradient_of_the_whole_batch(
    free_bits: float, sigma: float | None, pair: Pair
) -> None:
    rows = [randn(6, 3, 4, 4), rand(6, 3, 4, 4), randn(6, 5, seed=1), randn(6, 5, seed=2)]
    first, second = pair.run(losses_of_a_part, rows, free_bits, sigma)
    whole = terms(*[value.clone() for value in rows], free_bits, sigma)
    torch.testing.assert_close((first[0] + second[0]) / 2, whole[0])
    for a, b, gradient in zip(first[1:], second[1:], whole[1:], strict=True):
        torch.testing.assert_close(torch.cat([a, b]) / 2, gradient)  # processes average their gradients
    assert 0 < int((whole[2] == 0).all(0).sum()) < 5 if free_bits else bool((whole[2] != 0).all())


def test_heads_are_two_and_every_batchnorm_is_synchronized() -> None:
    method = tiny()
    assert (method.to_mean.in_features, method.to_mean.out_features) == (8, 4)
    assert (method.to_logvar.in_features, method.to_logvar.out_features) == (8, 4)
    norms = [m for m in method.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert len(norms) > 1
    assert all(type(m) is SyncBatchNorm for m in norms)


def test_embeddings_are_the_means() -> None:
    method = tiny()
    images = rand(4, 3, 8, 8).float()
    method(batch_of(images))
    (means,) = method.embeddings
    assert not means.requires_grad
    torch.testing.assert_close(means, method.posterior(images).mean.detach())


def test_images_outside_the_scale_are_refused_at_the_first_step() -> None:
    with pytest.raises(ConfigError, match=r"values from -1 to -1.*views\.normalize=false"):
        tiny()(batch_of(torch.full((2, 3, 8, 8), -1.0)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta": -1.0}, r"beta is -1\.0"),
        ({"beta": math.nan}, "beta is nan"),
        ({"free_bits": -0.1}, r"free_bits is -0\.1"),
        ({"kl_warmup": 1.5}, r"kl_warmup is 1\.5.*fraction of the run"),
        ({"reconstruction": "laplace"}, "reconstruction is 'laplace'"),
        ({"sigma": 0.0}, r"sigma is 0\.0.*positive"),
        ({"dim": 0}, "dim is 0"),
    ],
)
def test_impossible_values_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**changes)
