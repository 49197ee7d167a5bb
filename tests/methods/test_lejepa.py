from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from golden_cases import Case, golden_cases
from processes import Pair
from sslcli.distributed.collectives import rank
from sslcli.methods.base import Batch
from sslcli.methods.lejepa import LeJEPA, epps_pulley, invariance, sigreg
from tiny import TinyNet, make_batch


def tiny_lejepa(**changes: Any) -> LeJEPA:
    return LeJEPA(TinyNet(), **({"dim": 4, "hidden": 10, "num_directions": 16} | changes))


def loss_of(z: Tensor, directions: Tensor, *, weight: float, num_global: int, **values: Any) -> tuple[Tensor, ...]:
    near, normal = invariance(z, num_global=num_global), sigreg(z, directions, **values)
    return (1 - weight) * near + weight * normal, near, normal


@golden_cases("lejepa_ep")
def test_statistic_equals_the_official_code(case: Case) -> None:
    x = case.inputs["x"].requires_grad_()
    statistic = epps_pulley(x[None], knots=case.params["knots"], limit=case.params["t_max"])[0]
    statistic.mean().backward()
    case.check(statistic, "statistic")
    case.check(statistic.mean(), "statistic_mean")
    case.check(x.grad, "grad_x")


@golden_cases("lejepa_sigreg")
def test_mean_over_directions_and_views_equals_the_official_code(case: Case) -> None:
    z = case.inputs["z"].requires_grad_()
    statistic = sigreg(z, case.inputs["directions"], knots=case.params["knots"], limit=case.params["t_max"])
    statistic.backward()
    case.check(statistic, "statistic")
    case.check(z.grad, "grad_z")


def check_loss(case: Case) -> None:
    z, params = case.inputs["z"].requires_grad_(), case.params
    loss, near, normal = loss_of(
        z,
        case.inputs["directions"],
        weight=params["lambda"],
        num_global=params["global_views"],
        knots=params["knots"],
        limit=params["t_max"],
    )
    loss.backward()
    case.check(loss, "loss")
    case.check(near, "invariance")
    case.check(normal, "sigreg")
    case.check(z.grad, "grad_z")


@golden_cases("lejepa_loss")
def test_loss_equals_the_official_code(case: Case) -> None:
    check_loss(case)


@golden_cases("lejepa_multicrop")
def test_loss_of_global_and_local_views_equals_the_official_code(case: Case) -> None:
    check_loss(case)


@golden_cases("lejepa_two_views")
def test_loss_of_two_views_equals_the_official_code(case: Case) -> None:
    z1, z2 = (case.inputs[name].requires_grad_() for name in ("z1", "z2"))
    z = torch.stack([z1, z2])
    loss, near, normal = loss_of(z, case.inputs["directions"], weight=case.params["lambda"], num_global=2)
    loss.backward()
    case.check(loss, "loss")
    case.check(near, "invariance")
    case.check(normal, "sigreg")
    case.check(4 * near, "invariance_ebjepa")
    case.check(z1.grad, "grad_z1")
    case.check(z2.grad, "grad_z2")


@pytest.mark.parametrize("count", [16, 64])
def test_normal_samples_have_the_expected_statistic_at_any_batch_size(count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(40, count, 200, generator=generator, dtype=torch.float64)
    assert float(epps_pulley(samples).mean()) == pytest.approx(1.05246, rel=0.01)


@pytest.mark.parametrize("count", [3, 50])
def test_a_sample_of_zeros_has_a_statistic_proportional_to_its_size(count: int) -> None:
    assert float(epps_pulley(torch.zeros(1, count, 2, dtype=torch.float64)).mean()) == pytest.approx(
        0.40205 * count, rel=1e-4
    )


def test_normal_samples_of_variance_one_have_the_least_statistic() -> None:
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(1, 2000, 200, generator=generator, dtype=torch.float64)
    scales = [0.9 + 0.02 * i for i in range(11)]
    found = [float(epps_pulley(scale * samples).mean()) for scale in scales]
    assert abs(scales[found.index(min(found))] - 1) <= 0.02 + 1e-9


def test_gradient_is_exact_in_float64() -> None:
    z, directions = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True), torch.randn(3, 4)
    assert torch.autograd.gradcheck(lambda x: sigreg(x, directions.double()), z)


def test_blocks_of_directions_give_the_statistic_of_all() -> None:
    samples = torch.randn(1, 6, 300, dtype=torch.float64)
    each = torch.cat([epps_pulley(part) for part in samples.split(1, dim=2)], dim=1)
    torch.testing.assert_close(epps_pulley(samples), each)


def test_directions_are_new_in_each_step_and_equal_after_resumption() -> None:
    method = tiny_lejepa()
    before = method.directions.clone()
    method.after_step(0.0)
    assert not torch.equal(method.directions, before)
    twin = tiny_lejepa()
    twin.load_state_dict(method.state_dict())
    for one in (method, twin):
        one.after_step(0.1)
    assert torch.equal(method.directions, twin.directions)


def test_loss_is_the_weighted_sum_of_the_terms_of_all_views() -> None:
    method = tiny_lejepa(num_views=4, weight=0.3).eval()
    batch = make_batch(views=4)
    batch = Batch([*batch.views[:2], *(view[..., :4, :4] for view in batch.views[2:])], batch.index, batch.label)
    found = method(batch)
    z = torch.stack([method.projection(view) for view in batch.views])
    loss, near, normal = loss_of(z, method.directions, weight=0.3, num_global=2)
    torch.testing.assert_close((found["loss"], found["invariance"], found["sigreg"]), (loss, near, normal))
    assert len(method.embeddings) == 2


def loss_of_my_images(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    method = tiny_lejepa()
    part = z.chunk(2, dim=1)[rank()].clone().requires_grad_()
    loss, *_ = loss_of(part, method.directions.to(z.dtype), weight=0.3, num_global=2)
    loss.backward()
    assert part.grad is not None
    return loss.detach(), part.grad / 2, method.directions  # processes average their gradients


def test_two_processes_compute_the_loss_and_gradient_of_the_whole_batch(pair: Pair) -> None:
    z = torch.randn(3, 6, 4, dtype=torch.float64)
    first, second = pair.run(loss_of_my_images, z)
    assert torch.equal(first[2], second[2])
    z.requires_grad_()
    whole, *_ = loss_of(z, first[2].double(), weight=0.3, num_global=2)
    whole.backward()
    torch.testing.assert_close((first[0] + second[0]) / 2, whole.detach())
    torch.testing.assert_close(torch.cat([first[1], second[1]], dim=1), z.grad)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_views": 1}, "num_views is 1"),
        ({"weight": 1.5}, "weight is 1.5"),
        ({"num_directions": 0}, "num_directions"),
    ],
)
def test_impossible_values_are_refused(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_lejepa(**changes)


def test_global_views_must_be_first() -> None:
    """The first views are the global ones, so a small view between them would be part of the center."""
    large, small = torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 4, 4)
    method = tiny_lejepa(num_views=3)
    method.check_views([large, large, small])
    method.check_views([large, large, large])
    with pytest.raises(
        ValueError, match="view 2 has another size than view 1, but a later view has the size of view 1"
    ):
        method.check_views([large, small, large])
