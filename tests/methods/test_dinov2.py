from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from golden_cases import Case, golden_cases
from processes import Pair, my_half
from sslcli.engine.optim import parameter_groups
from sslcli.methods.base import Batch
from sslcli.methods.dino import DINO, cross_entropy_of_views
from sslcli.methods.dinov2 import DINOv2, koleo, lr_multiplier
from sslcli.methods.ibot import cross_entropy_of_patches, patch_weights
from tiny import mine, multi_crop_batch, vit


def tiny_dinov2(**changes: Any) -> DINOv2:
    values = {"image_size": 8, "num_prototypes": 12, "dim": 4, "hidden": 10, "num_views": 4}
    return DINOv2(vit(), **(values | changes))


@golden_cases("dinov2_loss")
def test_losses_and_centers_equal_the_official_code(case: Case) -> None:
    x, params = case.inputs, case.params
    sinkhorn = params["centering"] == "sinkhorn_knopp"
    method = tiny_dinov2(
        num_prototypes=params["K"],
        centering="sinkhorn" if sinkhorn else "center",
        center_momentum=params["center_momentum"],
        koleo_weight=params["koleo_weight"],
    ).to(case.dtype)
    locals_, found = params["local_crops"], {name: [] for name in case.outputs}  # type: ignore[var-annotated]
    for step in range(params["steps"]):
        inputs = [x[name][step].clone().requires_grad_() for name in ("student_cls", "student_local", "student_patch")]
        student_class, student_local, student_patch = inputs
        mask = x["masks"][step].bool().unflatten(0, (2, -1))
        teacher, patches = (x[name][step].unflatten(0, (2, -1)) for name in ("teacher_cls", "teacher_patch"))
        for buffer in (method.current_teacher_temperature, method.current_patch_teacher_temperature):
            buffer.fill_(params["teacher_temp"][step])
        student = torch.cat([student_class, student_local]).unflatten(0, (2 + locals_, -1))
        target = method.class_target(teacher)
        temperature = params["student_temp"]
        whole = cross_entropy_of_views(student, target, temperature=temperature)
        of_globals = cross_entropy_of_views(student[:2], target, temperature=temperature) * 2 / (2 + 2 * locals_)
        koleo_term = method.further_terms(student[:2])["koleo"]
        patches, masked = patches.flatten(0, 2), mask.flatten()
        parts = cross_entropy_of_patches(
            student_patch.flatten(0, 1),
            method.patch_target(patches, masked),
            patch_weights(mask, case.dtype),
            temperature=temperature,
        )
        loss = params["dino_weight"] * whole + params["ibot_weight"] * parts + koleo_term
        loss.backward()
        if not sinkhorn:
            method.center.lerp_(teacher.mean((0, 1)), 1 - method.center_momentum)
            method.patch_center.lerp_(method.mean_patch(patches, masked), 1 - method.patch_center_momentum)
        values = {"loss": loss, "dino_local": whole - of_globals, "dino_global": of_globals, "koleo": koleo_term}
        values |= {"ibot": parts, "center": method.center.clone(), "center_patch": method.patch_center.clone()}
        for name, tensor in zip(("student_cls", "student_local", "student_patch"), inputs, strict=True):
            assert tensor.grad is not None
            values[f"grad_{name}"] = tensor.grad
        for name, value in values.items():
            found[name].append(value.detach())
    for name, values_of_steps in found.items():
        case.check(values_of_steps, name)


@golden_cases("dinov2_koleo")
def test_koleo_equals_the_official_code(case: Case) -> None:
    x = case.inputs["x"].requires_grad_()
    loss = koleo(x)
    loss.backward()
    case.check(loss, "loss")
    case.check(x.grad, "grad_x")


@golden_cases("dinov2_param_groups")
def test_learning_rates_of_the_layers_equal_the_official_code(case: Case) -> None:
    params = case.params
    found = [
        lr_multiplier(
            name,
            depth=params["layers"],
            layer_decay=params["layer_decay"],
            patch_embed_lr=params["patch_embed_lr_mult"],
        )
        for name in params["names"]
    ]
    case.check(torch.tensor(found, dtype=case.dtype)[case.inputs["index"]], "lr_multiplier")


@pytest.mark.parametrize("count", [3, 8])
def test_koleo_of_points_on_a_circle_is_the_logarithm_of_their_distance(count: int) -> None:
    angle = torch.arange(count, dtype=torch.float64) * 2 * math.pi / count
    points = torch.stack([angle.cos(), angle.sin()], dim=1)
    assert float(koleo(7 * points)) == pytest.approx(-math.log(2 * math.sin(math.pi / count)), abs=1e-6)


def test_without_patches_and_koleo_the_loss_is_that_of_dino() -> None:
    torch.manual_seed(0)
    method = tiny_dinov2(centering="center", koleo_weight=0.0, patch_weight=0.0, mask_fraction=0.0)
    method.before_step(0.0, 60.0)
    dino = DINO(vit(), num_prototypes=12, dim=4, hidden=10, num_views=4, teacher_temperature=0.07, trained_gain=True)
    dino.load_state_dict({k: v for k, v in method.state_dict().items() if k in dino.state_dict()})
    batch = multi_crop_batch()
    torch.testing.assert_close(method(batch)["loss"], dino(batch)["loss"], rtol=1e-6, atol=1e-6)


def test_temperature_increases_in_every_step() -> None:
    method = tiny_dinov2(warmup_teacher_temperature_epochs=4)
    found = []
    for epoch in (0.0, 1.0, 1.5, 4.0, 9.0):
        method.before_step(0.0, epoch)
        found.append(float(method.current_teacher_temperature))
    assert found == pytest.approx([0.04, 0.0475, 0.05125, 0.07, 0.07])


def test_half_of_the_global_views_are_masked() -> None:
    masks = tiny_dinov2().draw_masks(50, torch.device("cpu"))
    assert masks.shape == (2, 50, 16)
    assert 40 <= int(masks.any(2).sum()) <= 50  # small targets leave a few of the 50 views without a block
    assert int(masks.sum(2).max()) <= 8


def test_heads_compute_all_masked_patches_and_always_the_same_number() -> None:
    method, rows = tiny_dinov2(), set()
    for _ in range(20):
        masks = method.draw_masks(50, torch.device("cpu"))
        places = method.places(masks)
        assert places.unique().numel() == len(places)
        assert int(masks.flatten()[places].sum()) == int(masks.sum())
        rows.add(len(places))
    (number,) = rows
    assert number <= 0.2 * masks.numel()  # half of the views, 0.3 of their patches


@pytest.mark.parametrize("centering", ["sinkhorn", "center"])
def test_the_loss_does_not_depend_on_patches_that_are_not_masked(
    monkeypatch: pytest.MonkeyPatch, centering: str
) -> None:
    batch, found = multi_crop_batch(dtype=torch.float64), []
    for every_patch in (False, True):
        torch.manual_seed(0)
        method = tiny_dinov2(centering=centering).double()
        if every_patch:
            monkeypatch.setattr(method, "places", lambda mask: None)
        loss = method(batch)["loss"]
        loss.backward()
        method.after_step(0.0)
        found.append((loss, method.patch_center, [p.grad for p in method.parameters() if p.grad is not None]))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("centering", ["sinkhorn", "center"])
def test_a_batch_without_masked_patches_has_a_finite_loss(centering: str) -> None:
    method = tiny_dinov2(mask_fraction=0.0, centering=centering)
    scalars = method(multi_crop_batch())
    scalars["loss"].backward()
    assert scalars["loss"].isfinite()
    assert float(scalars["patch_loss"].detach()) == 0.0
    assert all(p.grad.isfinite().all() for p in method.parameters() if p.grad is not None)


def test_every_parameter_has_the_rate_of_its_layer() -> None:
    method = tiny_dinov2(layer_decay=0.5, patch_embed_lr=0.25)
    names = {id(parameter): name for name, parameter in method.named_parameters()}
    scales = {
        names[id(p)]: group.get("lr_scale", 1.0)
        for group in parameter_groups(method, weight_decay=0.1)
        for p in group["params"]
    }
    assert scales["backbone.norm.weight"] == 1.0
    assert scales["backbone.blocks.2.mlp.fc1.weight"] == 0.5
    assert scales["backbone.blocks.0.mlp.fc1.weight"] == 0.125
    assert scales["backbone.cls_token"] == scales["mask_token"] == 0.0625
    assert scales["backbone.patch_embed.proj.weight"] == 0.0625 / 4
    assert scales["head.mlp.0.weight"] == 1.0


SEPARATE = {"separate_heads": True, "patch_num_prototypes": 10, "patch_dim": 6}


@pytest.mark.parametrize("centering", ["sinkhorn", "center"])
def test_separate_heads_with_equal_weights_have_the_loss_and_gradients_of_the_shared_head(centering: str) -> None:
    shared, separate = (tiny_dinov2(centering=centering, **changes) for changes in ({}, {"separate_heads": True}))
    state = shared.state_dict()
    heads = {"patch_head": "head", "teacher_patch_head": "teacher_head"}
    copied = {f"{own}.{name}": state[f"{head}.{name}"] for own, head in heads.items() for name in head_names(shared)}
    separate.load_state_dict(state | copied)
    batch = multi_crop_batch()
    for _ in range(3):  # the center and the teacher of patches change too
        losses = []
        for method in (shared, separate):
            method.zero_grad()
            losses.append(method(batch)["loss"])
            losses[-1].backward()
        torch.testing.assert_close(losses[0], losses[1])
        for name, parameter in shared.head.named_parameters():
            parts = (head.get_parameter(name).grad for head in (separate.head, separate.patch_head))
            torch.testing.assert_close(sum(parts), parameter.grad, rtol=1e-4, atol=1e-6)
        with torch.no_grad():
            for parameter in shared.head.parameters():
                parameter.mul_(1.1)
            for head in (separate.head, separate.patch_head):
                for parameter in head.parameters():
                    parameter.mul_(1.1)
        for method in (shared, separate):
            method.after_step(0.5)
    torch.testing.assert_close(separate.patch_center, shared.patch_center)
    for name in head_names(shared):
        assert torch.equal(
            separate.state_dict()[f"teacher_patch_head.{name}"], shared.state_dict()[f"teacher_head.{name}"]
        )


def head_names(method: DINOv2) -> list[str]:
    return list(method.head.state_dict())


def test_a_separate_head_has_its_own_prototypes_and_only_patches_reach_it() -> None:
    method = tiny_dinov2(**SEPARATE, koleo_weight=0.0)
    assert method.patch_head is not None
    assert tuple(method.patch_head.last_layer.weight_v.shape) == (10, 6)
    assert (method.patch_center.shape, method.center.shape) == ((10,), (12,))
    options = method.group_options()
    assert options["patch_head.last_layer"] == options["head.last_layer"] == {"frozen_epochs": 1}
    scalars = method(multi_crop_batch())
    for loss, trained, other in (
        ("class_loss", method.head, method.patch_head),
        ("patch_loss", method.patch_head, method.head),
    ):
        gradients = torch.autograd.grad(scalars[loss], [trained.mlp[0].weight, other.mlp[0].weight],
            retain_graph=True, allow_unused=True)  # fmt: skip
        assert gradients[0].abs().max() > 0
        assert gradients[1] is None


def loss_and_gradients(batch: Batch, centering: str, changes: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(0)
    method = tiny_dinov2(centering=centering, **changes).double()
    losses = []
    for step in range(2):
        loss = method(mine(batch))["loss"]
        losses.append(loss.detach())
        method.zero_grad()
        loss.backward()
        method.after_step(step / 2)
    return torch.stack(losses), [p.grad for p in method.parameters() if p.grad is not None]


@pytest.mark.parametrize(
    ("centering", "changes"),
    [("sinkhorn", {}), ("center", {}), ("center", SEPARATE)],
    ids=["sinkhorn", "center", "heads"],
)
def test_two_processes_compute_the_loss_and_gradient_of_the_whole_batch(
    pair: Pair, centering: str, changes: dict[str, Any]
) -> None:
    batch = multi_crop_batch(dtype=torch.float64)
    losses, gradients = loss_and_gradients(batch, centering, changes)
    first, second = pair.run(loss_and_gradients, batch, centering, changes)
    torch.testing.assert_close((first[0] + second[0]) / 2, losses)
    for one, other, whole in zip(first[1], second[1], gradients, strict=True):
        torch.testing.assert_close((one + other) / 2, whole)


def koleo_of_my_half(x: Tensor) -> tuple[Tensor, Tensor]:
    part = my_half(x).requires_grad_()
    loss = koleo(part)
    loss.backward()
    assert part.grad is not None
    return loss.detach(), part.grad / 2  # processes average their gradients


def test_two_processes_search_neighbors_among_all_images(pair: Pair) -> None:
    x = torch.randn(8, 4, dtype=torch.float64)
    first, second = pair.run(koleo_of_my_half, x)
    x.requires_grad_()
    whole = koleo(x)
    whole.backward()
    torch.testing.assert_close((first[0] + second[0]) / 2, whole.detach())
    torch.testing.assert_close(torch.cat([first[1], second[1]]), x.grad)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"centering": "both"}, "centering is 'both', but it must be one of center, sinkhorn"),
        ({"mask_range": (0.5, 0.1)}, "mask_range is"),
        ({"layer_decay": 1.5}, "layer_decay is 1.5"),
        ({"patch_dim": 4}, "patch_dim is 4, but patches share the head of class tokens: set separate_heads=true"),
        ({"separate_heads": True, "patch_num_prototypes": 0}, "patch_num_prototypes is 0"),
    ],
)
def test_impossible_values_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_dinov2(**changes)
