from __future__ import annotations

import math
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from golden_cases import Case, golden_cases
from processes import Pair
from sslcli.methods import mutual_information
from sslcli.methods.mutual_information import MEASURES, concat_loss, dot_loss, expectations, prior_losses
from sslcli.nn.heads import mlp


def random_pairs(num_images: int = 4, units: int = 6, places: int = 5, vectors: int = 1) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    shapes = ((num_images, units, places), (num_images, units, vectors))
    local, of_image = (torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes)
    return local, of_image


def split_scores(local: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of pairs of one image, and of all pairs of two images, one after the other."""
    positive, negative = [], []
    for i in range(len(vectors)):
        for j in range(len(local)):
            for a in range(local.shape[2]):
                for b in range(vectors.shape[2]):
                    (positive if i == j else negative).append(vectors[i, :, b] @ local[j, :, a])
    return torch.stack(positive), torch.stack(negative)


def infonce_by_hand(local: Tensor, vectors: Tensor, mask: float) -> Tensor:
    """Cross-entropy over an explicit (N n k) x (1 + N n) matrix."""
    rows = []
    for i in range(len(vectors)):
        for a in range(local.shape[2]):
            for b in range(vectors.shape[2]):
                others = torch.einsum("u,jun->jn", vectors[i, :, b], local)
                others = others.where(torch.arange(len(local))[:, None] != i, torch.tensor(mask, dtype=others.dtype))
                rows.append(torch.cat([(vectors[i, :, b] @ local[i, :, a])[None], others.flatten()]))
    return F.cross_entropy(torch.stack(rows), torch.zeros(len(rows), dtype=torch.long))


def check_local_and_global(case: Case) -> None:
    measures = {"jsd": "JSD", "gan": "GAN", "nce": "InfoNCE", "dv": "DV"}
    for name, measure in measures.items():
        local, vectors = (case.inputs[key].requires_grad_() for key in ("l", "m"))
        loss = dot_loss(local, vectors, measure=measure, official_mask=True)
        loss.backward()
        case.check(loss, f"loss_{name}")
        case.check(local.grad, f"grad_l_{name}")
        case.check(vectors.grad, f"grad_m_{name}")
    case.check(dot_loss(case.inputs["l"], case.inputs["m"], measure="InfoNCE"), "loss_nce_exact")


@golden_cases("dim_local")
def test_local_losses_and_gradients_equal_the_official_code(case: Case) -> None:
    check_local_and_global(case)


@golden_cases("dim_global")
def test_global_losses_and_gradients_equal_the_official_code(case: Case) -> None:
    check_local_and_global(case)


@golden_cases("dim_expectations")
def test_expectations_of_every_measure_equal_the_official_code(case: Case) -> None:
    for name in case.outputs:
        if name.startswith("pos_"):
            measure = name.removeprefix("pos_")
            positive, negative = expectations(case.inputs["p_samples"], case.inputs["q_samples"], measure)
            case.check(positive, f"pos_{measure}")
            case.check(negative, f"neg_{measure}")


@golden_cases("dim_prior")
def test_both_players_of_the_prior_get_the_official_gradients_from_one_backward(case: Case) -> None:
    names = [name.removeprefix("w") for name in case.inputs if name.startswith("w")]  # "1", "2", ... by layer
    net = network_of([(case.inputs[f"w{i}"], case.inputs[f"b{i}"]) for i in sorted(names, key=int)])
    z = case.inputs["z"].requires_grad_()
    encoder_loss, discriminator_loss = prior_losses(net, z, case.inputs["prior"])
    (encoder_loss + discriminator_loss).backward()
    case.check(encoder_loss, "loss_encoder")
    case.check(discriminator_loss, "loss_discriminator")
    case.check(z.grad, "grad_z")
    for i, layer in enumerate((part for part in net if isinstance(part, nn.Linear)), start=1):
        case.check(layer.weight.grad, f"grad_w{i}")
    with torch.no_grad():
        real, fake = net(case.inputs["prior"]), net(case.inputs["z"].sigmoid())
    positive, negative = expectations(real, fake, case.params["measure"])
    case.check(positive, "e_pos")
    case.check(negative, "e_neg")


def network_of(weights: list[tuple[Tensor, Tensor]]) -> nn.Sequential:
    """Linear layers of these weights with ReLU between."""
    widths = [weights[0][0].shape[1], *(len(bias) for _, bias in weights)]
    net = mlp(widths, norm=False, bias=True, last_bias=True).to(weights[0][0].dtype)
    for layer, (weight, bias) in zip((part for part in net if isinstance(part, nn.Linear)), weights, strict=True):
        layer.load_state_dict({"weight": weight, "bias": bias})
    return net


@pytest.mark.parametrize("vectors", [1, 3])
@pytest.mark.parametrize("measure", [name for name in MEASURES if name != "InfoNCE"])
def test_loss_is_the_negative_expectation_less_the_positive_over_all_pairs(measure: str, vectors: int) -> None:
    local, of_image = random_pairs(vectors=vectors)
    positive, negative = expectations(*split_scores(local, of_image), measure)
    torch.testing.assert_close(dot_loss(local, of_image, measure=measure), negative - positive)


@pytest.mark.parametrize("vectors", [1, 3])
def test_jsd_is_binary_cross_entropy_with_logits_less_two_log_2(vectors: int) -> None:
    local, of_image = random_pairs(vectors=vectors)
    positive, negative = split_scores(local, of_image)
    related = F.binary_cross_entropy_with_logits(positive, torch.ones_like(positive))
    unrelated = F.binary_cross_entropy_with_logits(negative, torch.zeros_like(negative))
    torch.testing.assert_close(dot_loss(local, of_image, measure="JSD"), related + unrelated - 2 * math.log(2))


@pytest.mark.parametrize("vectors", [1, 3])
@pytest.mark.parametrize(("official_mask", "mask"), [(False, -math.inf), (True, -10.0)])
def test_infonce_is_the_cross_entropy_on_the_explicit_matrix(official_mask: bool, mask: float, vectors: int) -> None:
    local, of_image = random_pairs(vectors=vectors)
    loss = dot_loss(local, of_image, measure="InfoNCE", official_mask=official_mask)
    by_hand = infonce_by_hand(local, of_image, mask)
    torch.testing.assert_close(loss, by_hand)
    gradients = [torch.autograd.grad(value, (local, of_image)) for value in (loss, by_hand)]
    torch.testing.assert_close(*gradients)


def test_scores_of_zero_tell_nothing() -> None:
    local, of_image = torch.zeros(4, 6, 5), torch.zeros(4, 6, 1)
    assert float(dot_loss(local, of_image, measure="JSD")) == pytest.approx(0, abs=1e-6)
    assert float(dot_loss(local, of_image, measure="DV")) == pytest.approx(0, abs=1e-6)
    assert float(dot_loss(local, of_image, measure="InfoNCE")) == pytest.approx(math.log(1 + (4 - 1) * 5))


def test_jsd_falls_to_minus_two_log_2_and_stays_finite_at_large_scores() -> None:
    local, of_image = torch.eye(4)[..., None] * 2e3 - 1e3, torch.eye(4)[..., None]
    local.requires_grad_()
    loss = dot_loss(local, of_image, measure="JSD")
    assert loss.item() == pytest.approx(-2 * math.log(2))
    (worst,) = torch.autograd.grad(dot_loss(-local, of_image, measure="JSD"), local)
    assert worst.isfinite().all()


def test_dv_with_the_best_critic_recovers_the_information_of_two_gaussians() -> None:
    rho = 0.8
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 4000, dtype=torch.float64, generator=generator)
    y = rho * x + math.sqrt(1 - rho**2) * noise
    slope = rho / (1 - rho**2)  # the log of the ratio of densities is bilinear in (x^2, 1, x) and (1, y^2, y)
    vectors = torch.stack([-slope * rho / 2 * x**2, torch.ones_like(x), slope * x], dim=1)
    places = torch.stack([torch.ones_like(y), -slope * rho / 2 * y**2, y], dim=1)
    loss = dot_loss(places[..., None], vectors[..., None], measure="DV")
    assert -float(loss) == pytest.approx(-math.log(1 - rho**2) / 2, abs=0.02)


@pytest.mark.parametrize("measure", ["InfoNCE", "JSD", "DV", "KL"])
def test_blocks_of_rows_change_neither_loss_nor_gradient(measure: str) -> None:
    local, of_image = random_pairs(num_images=6, vectors=2)
    whole = dot_loss(local, of_image, measure=measure)
    with patch.object(mutual_information, "CHUNK_VALUES", 2 * 2 * 6 * 5):  # two rows a block
        parts = dot_loss(local, of_image, measure=measure)
        of_parts = torch.autograd.grad(parts, (local, of_image))
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(of_parts, torch.autograd.grad(whole, (local, of_image)))


def test_blocks_keep_no_scores_for_the_backward_pass() -> None:
    local, of_image = random_pairs(num_images=16, places=9)
    kept: list[int] = []

    def keep(values: Tensor) -> Tensor:
        kept.append(values.numel())
        return values

    def largest() -> int:
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda values: values):
            dot_loss(local, of_image, measure="InfoNCE")
        return max(kept)

    assert largest() >= 16 * 16 * 9
    with patch.object(mutual_information, "CHUNK_VALUES", 2 * 16 * 9):
        assert largest() <= max(local.numel(), 2 * 16 * 9)


def test_own_places_are_no_negatives() -> None:
    places = torch.zeros(2, 2, 3, dtype=torch.float64)
    places[0, 0], places[1, 1] = 50.0, 50.0  # each vector knows its own image for sure
    vectors = torch.eye(2, dtype=torch.float64)[..., None]
    assert float(dot_loss(places, vectors, measure="InfoNCE")) == pytest.approx(0, abs=1e-12)


def test_a_single_image_is_refused() -> None:
    with pytest.raises(ValueError, match=r"there is 1: set train\.batch_size"):
        dot_loss(torch.zeros(1, 4, 5), torch.zeros(1, 4, 1), measure="JSD")


class Bilinear(nn.Module):
    """Scores (N, D + D, H, W) by the product of both halves."""

    def forward(self, pairs: Tensor) -> Tensor:
        vector, place = pairs.chunk(2, dim=1)
        return (vector * place).sum(1, keepdim=True)


@pytest.mark.parametrize("measure", MEASURES)
def test_concat_contrasts_with_the_map_of_the_next_image(measure: str) -> None:
    maps, vectors = torch.randn(4, 3, 2, 5, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    positive = torch.einsum("nd,ndhw->nhw", vectors, maps).flatten(1)
    negative = torch.einsum("nd,ndhw->nhw", vectors, maps[[1, 2, 3, 0]]).flatten(1)
    if measure == "InfoNCE":
        logits = torch.cat([positive[:, :, None], negative[:, None].expand(-1, 10, -1)], dim=2).flatten(0, 1)
        expected = F.cross_entropy(logits, torch.zeros(40, dtype=torch.long))
    else:
        of_positive, of_negative = expectations(positive, negative, measure)
        expected = of_negative - of_positive
    torch.testing.assert_close(concat_loss(Bilinear(), maps, vectors, measure=measure), expected)


def test_neither_player_of_the_prior_moves_the_other() -> None:
    net, z = mlp([4, 8, 1], norm=False, bias=True, last_bias=True), torch.randn(6, 4, requires_grad=True)
    encoder_loss, discriminator_loss = prior_losses(net, z, torch.rand(6, 4))
    weights = list(net.parameters())
    assert torch.autograd.grad(encoder_loss, weights, retain_graph=True, allow_unused=True) == (None,) * 4
    assert torch.autograd.grad(discriminator_loss, z, retain_graph=True, allow_unused=True) == (None,)
    both = torch.autograd.grad(encoder_loss + discriminator_loss, [z, *weights], retain_graph=True)
    alone = (
        *torch.autograd.grad(encoder_loss, z, retain_graph=True),
        *torch.autograd.grad(discriminator_loss, weights),
    )
    torch.testing.assert_close(both, alone)


def test_losses_are_float32_under_autocast() -> None:
    local, of_image = torch.randn(4, 6, 5).bfloat16(), torch.randn(4, 6, 1).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss = dot_loss(local, of_image, measure="InfoNCE")
        of_players = prior_losses(mlp([6, 1], last_bias=True), torch.randn(4, 6).bfloat16(), torch.rand(4, 6))
    assert {value.dtype for value in (loss, *of_players)} == {torch.float32}
    torch.testing.assert_close(loss, dot_loss(local.float(), of_image.float(), measure="InfoNCE"))


def losses_of_a_part(local: Tensor, vectors: Tensor, measure: str) -> tuple[Tensor, ...]:
    rank = torch.distributed.get_rank()
    mine, queries = (whole.chunk(2)[rank].clone().requires_grad_() for whole in (local, vectors))
    alone = dot_loss(mine, queries, measure=measure, gather=False).detach()
    dot = dot_loss(mine, queries, measure=measure)
    concat = concat_loss(Bilinear(), mine[..., None], queries[..., 0], measure=measure)
    (dot + concat).backward()
    return alone, dot.detach(), concat.detach(), mine.grad / 2, queries.grad / 2  # processes average their gradients


@pytest.mark.parametrize("measure", MEASURES)
def test_two_processes_compute_the_loss_and_gradient_of_the_whole_batch(measure: str, pair: Pair) -> None:
    local, vectors = random_pairs(num_images=6)
    first, second = pair.run(losses_of_a_part, local.detach(), vectors.detach(), measure)
    for index, rows in enumerate((slice(0, 3), slice(3, 6))):
        alone = (first, second)[index][0]
        torch.testing.assert_close(alone, dot_loss(local[rows], vectors[rows], measure=measure).detach())
    dot = dot_loss(local, vectors, measure=measure)
    concat = concat_loss(Bilinear(), local[..., None], vectors[..., 0], measure=measure)
    (dot + concat).backward()
    torch.testing.assert_close((first[1] + second[1]) / 2, dot.detach())
    torch.testing.assert_close((first[2] + second[2]) / 2, concat.detach())
    torch.testing.assert_close(torch.cat([first[3], second[3]]), local.grad)
    torch.testing.assert_close(torch.cat([first[4], second[4]]), vectors.grad)
