from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from golden_cases import Case, golden_cases
from sslcli.methods.densecl import DenseCL, dense_contrast, matching_places
from sslcli.nn.contrastive import info_nce
from sslcli.nn.queue import enqueue
from tiny import TinyNet, make_batch


class TinyMaps(TinyNet):
    """TinyNet with its feature map: 3 x 3 places of 8 channels for images of 8 pixels."""

    def stages(self, images: Tensor) -> dict[str, Tensor]:
        return {"conv": torch.relu(self.norm(self.conv(images)))}


def tiny_densecl(backbone: nn.Module | None = None, **changes: Any) -> DenseCL:
    values = {"image_size": 8, "dim": 4, "hidden": 6, "queue_size": 16, "bn_group": 4}
    return DenseCL(TinyMaps() if backbone is None else backbone, **(values | changes))


@golden_cases("densecl")
def test_steps_equal_the_official_code(case: Case) -> None:
    x, params = case.inputs, case.params
    queue, dense_queue = x["queue0"].T.contiguous(), x["queue20"].T.contiguous()
    heads = [torch.tensor(0), torch.tensor(0)]
    temperature, weight = params["temperature"], params["lambda"]
    for step in range(params["steps"]):
        q, q_grid = (x[name][step].clone().requires_grad_() for name in ("q", "q_grid"))
        key = F.normalize(x["k"][step], dim=1)
        match = matching_places(x["q_map"][step].flatten(2), x["k_map"][step].flatten(2))
        whole = info_nce(F.normalize(q, dim=1), key, queue, temperature=temperature).loss
        dense = dense_contrast(q_grid, x["k_grid"][step], match, dense_queue, temperature=temperature).loss
        loss = (1 - weight) * whole + weight * dense
        loss.backward()
        enqueue(queue, heads[0], key)
        enqueue(dense_queue, heads[1], F.normalize(x["k_grid"][step].mean(2), dim=1))
        found = {"loss_single": (1 - weight) * whole, "loss_dense": weight * dense, "loss": loss, "queue": queue.T}
        found |= {
            "queue2": dense_queue.T,
            "ptr": heads[0],
            "match": match,
            "grad_q": q.grad,
            "grad_q_grid": q_grid.grad,
        }
        for name, value in found.items():
            assert value is not None
            torch.testing.assert_close(
                value.detach(),
                case.outputs[name][step],
                rtol=case.entry["rtol"],
                atol=case.entry["atol"],
                check_dtype=False,
            )


def test_matching_is_that_of_an_explicit_search() -> None:
    query, key = torch.randn(2, 2, 5, 6, dtype=torch.float64)
    match = matching_places(query, key)
    for image in range(2):
        for place in range(6):
            similar = [F.cosine_similarity(query[image, :, place], key[image, :, other], dim=0) for other in range(6)]
            assert int(match[image, place]) == max(range(6), key=lambda other: float(similar[other]))


def test_order_of_the_places_of_the_key_does_not_matter() -> None:
    query, key, query_map, key_map = torch.randn(4, 2, 5, 6, dtype=torch.float64).unbind()
    queue = F.normalize(torch.randn(7, 5, dtype=torch.float64), dim=1)
    order = torch.randperm(6)
    one = dense_contrast(query, key, matching_places(query_map, key_map), queue, temperature=0.2).loss
    match = matching_places(query_map, key_map[..., order])
    torch.testing.assert_close(dense_contrast(query, key[..., order], match, queue, temperature=0.2).loss, one)


def test_one_place_has_the_loss_of_whole_images() -> None:
    query, key = torch.randn(2, 3, 5, 1, dtype=torch.float64)
    queue = F.normalize(torch.randn(7, 5, dtype=torch.float64), dim=1)
    unit_query, unit_key = F.normalize(query[..., 0], dim=1), F.normalize(key[..., 0], dim=1)
    whole = info_nce(unit_query, unit_key, queue, temperature=0.2).loss
    match = matching_places(query, key)
    torch.testing.assert_close(dense_contrast(query, key, match, queue, temperature=0.2).loss, whole)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_loss_is_the_weighted_sum_of_both_losses(weight: float) -> None:
    torch.manual_seed(0)
    method, batch = tiny_densecl(TinyMaps(norm=False), dense_weight=weight), make_batch()
    query = method.query(batch.views[0])
    key, _, _ = method.encode_places(batch.views[1])
    whole = method.contrast(query, key).loss
    found = method(batch)
    torch.testing.assert_close(found["loss"], (1 - weight) * whole + weight * found["dense_loss"])


def test_keys_of_shuffled_images_are_those_of_the_images_without_batchnorm() -> None:
    method, images = tiny_densecl(TinyMaps(norm=False)), make_batch().views[1]
    keys, places, maps = method.encode_places(images)
    expected = method.momentum_backbone.stages(images)["conv"]
    torch.testing.assert_close(maps, expected.flatten(2))
    torch.testing.assert_close(places, method.momentum_dense_head(expected).flatten(2))
    torch.testing.assert_close(keys, F.normalize(method.momentum_head(expected.mean((2, 3))), dim=1))


def test_a_step_moves_both_momentum_heads_and_fills_both_queues() -> None:
    method, batch = tiny_densecl(momentum=0.9), make_batch()
    before = [parameter.clone() for parameter in method.momentum_dense_head.parameters()]
    method(batch)["loss"].backward()
    assert all(p.grad is not None for p in method.dense_head.parameters())
    with torch.no_grad():
        for parameter in method.dense_head.parameters():
            parameter.add_(1.0)
    queue, dense_queue = method.queue.clone(), method.dense_queue.clone()
    method.after_step(0.0)
    for now, old in zip(method.momentum_dense_head.parameters(), before, strict=True):
        torch.testing.assert_close(now, old + 0.1)
    assert not torch.equal(method.queue[:8], queue[:8])
    assert not torch.equal(method.dense_queue[:8], dense_queue[:8])
    assert torch.equal(method.dense_queue[8:], dense_queue[8:])
    torch.testing.assert_close(method.dense_queue.norm(dim=1), torch.ones(16))


class OtherFeatures(TinyMaps):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) + 1


def test_a_backbone_whose_features_are_not_the_mean_of_its_map_is_refused() -> None:
    with pytest.raises(ValueError, match="features of the backbone OtherFeatures are not the mean"):
        tiny_densecl(OtherFeatures())
    with pytest.raises(ValueError, match="TinyNet has no stages"):
        tiny_densecl(TinyNet())


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"dense_weight": 1.5}, "dense_weight is 1.5"), ({"queue_size": 0}, "queue_size is 0")],
)
def test_impossible_values_are_refused(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_densecl(**changes)
