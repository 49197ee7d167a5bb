from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from golden_cases import Case, golden_cases
from processes import Pair
from sslcli.methods.base import Batch
from sslcli.methods.ijepa import IJEPA, Predictor, target_features
from sslcli.nn.masks import multiblock_masks
from tiny import TinyNet, make_batch, mine, vit

OFFICIAL = {
    "predictor_embed": "embed",
    "predictor_blocks": "blocks",
    "predictor_norm": "norm",
    "predictor_proj": "predict",
}


def tiny_ijepa(**changes: Any) -> IJEPA:
    values = {"image_size": 8, "predictor_dim": 8, "predictor_depth": 1, "predictor_heads": 2, "min_context": 1}
    return IJEPA(vit(pool="mean"), **(values | changes))


@golden_cases("ijepa_loss")
def test_targets_and_loss_equal_the_official_code(case: Case) -> None:
    x = case.inputs
    prediction = x["z"].requires_grad_()
    target = target_features(x["h"], x["masks_pred"])
    case.check(target.flatten(0, 1), "targets")
    loss = F.smooth_l1_loss(prediction, target.flatten(0, 1))
    loss.backward()
    case.check(loss, "loss")
    case.check(prediction.grad, "grad_z")


@golden_cases("ijepa_predictor")
def test_predictor_equals_the_official_one(case: Case) -> None:
    x, params = case.inputs, case.params
    side = round(params["patches"] ** 0.5)
    predictor = Predictor(
        params["D"], grid=(side, side), dim=params["D_pred"], depth=params["depth"], num_heads=params["heads"]
    ).to(case.dtype)
    case.check(predictor.pos_embed, "pos_embed")
    predictor.pos_embed.copy_(case.outputs["pos_embed"])  # without the rounding of float32
    state = {"mask_token": x["mask_token"]}
    for name, value in x.items():
        first, _, rest = name.partition(".")
        if first in OFFICIAL:
            state[f"{OFFICIAL[first]}.{rest}"] = value
    predictor.load_state_dict(state)
    context = x["x"].requires_grad_()
    out = predictor(context, x["masks_enc"][0], x["masks_pred"]).flatten(0, 1)
    loss = (out * x["coef"]).sum()
    loss.backward()
    case.check(out, "out")
    case.check(loss, "loss")
    case.check(context.grad, "grad_x")
    case.check(predictor.mask_token.grad, "grad_mask_token")


def test_targets_have_mean_0_and_variance_1() -> None:
    tokens, targets = 3 * torch.randn(2, 16, 8) + 1, torch.randint(16, (4, 2, 5))
    found = target_features(tokens, targets)
    torch.testing.assert_close(found.mean(3), torch.zeros(4, 2, 5), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.var(3, correction=0), torch.ones(4, 2, 5), atol=1e-4, rtol=0)


def test_order_of_the_target_places_permutes_the_predictions() -> None:
    predictor = Predictor(6, grid=(4, 4), dim=8, depth=2, num_heads=2).double()
    context, places = torch.randn(2, 7, 6, dtype=torch.float64), torch.arange(7).expand(2, 7)
    targets = torch.stack([torch.randperm(16)[:5] for _ in range(6)]).view(3, 2, 5)
    order = torch.randperm(5)
    out = predictor(context, places, targets)
    torch.testing.assert_close(predictor(context, places, targets[..., order]), out[:, :, order])


def test_a_step_predicts_the_teachers_features_at_the_targets() -> None:
    method, batch = tiny_ijepa(), make_batch(views=1)
    twin = copy.deepcopy(method.noise)
    found = method(batch)["loss"]
    masks = multiblock_masks(twin, 8, (4, 4), device=torch.device("cpu"), **method.masks)
    images = batch.views[0]
    target = target_features(method.teacher.tokens(images)[0][:, 1:], masks.targets)
    context = method.backbone.tokens(images, keep=masks.context)[0][:, 1:]
    expected = F.smooth_l1_loss(method.predictor(context, masks.context, masks.targets), target)
    torch.testing.assert_close(found, expected)
    found.backward()
    assert all(p.grad is None for p in method.teacher.parameters())
    assert all(p.grad is not None for p in method.predictor.parameters())


def test_teacher_is_evaluated_and_follows_the_student_linearly() -> None:
    method, images = tiny_ijepa(momentum=0.5), make_batch(views=1).views[0]
    weight = [method.teacher.norm.weight.clone()]  # type: ignore[union-attr, operator]
    with torch.no_grad():
        method.backbone.norm.weight.fill_(3.0)  # type: ignore[union-attr, operator]
    for step in range(3):
        method.after_step(step / 4)
        momentum = 0.5 + 0.5 * step / 4
        weight.append(momentum * weight[-1] + (1 - momentum) * 3.0)
    torch.testing.assert_close(method.teacher.norm.weight.detach(), weight[-1].detach())  # type: ignore[union-attr]
    assert method.scheduled(1.0)["EMA momentum"] == 1.0
    torch.testing.assert_close(method.features(images), method.teacher(images))


def losses_and_gradients(batch: Batch) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(0)
    method = tiny_ijepa().double()
    losses = []
    for step in range(2):
        loss = method(mine(batch))["loss"]
        losses.append(loss.detach())
        method.zero_grad()
        loss.backward()
        method.after_step(step / 2)
    return torch.stack(losses), [p.grad for p in method.parameters() if p.grad is not None]


def test_two_processes_compute_the_loss_and_gradient_of_the_whole_batch(pair: Pair) -> None:
    batch = make_batch(views=1, dtype=torch.float64)
    losses, gradients = losses_and_gradients(batch)
    first, second = pair.run(losses_and_gradients, batch)
    torch.testing.assert_close((first[0] + second[0]) / 2, losses)
    for one, other, whole in zip(first[1], second[1], gradients, strict=True):
        torch.testing.assert_close((one + other) / 2, whole)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"predictor_dim": 10}, "predictor_dim is 10, but it must be divisible by 4"),
        ({"target_scale": (0.3, 0.2)}, r"target_scale is \[0.3, 0.2\]"),
        ({"image_size": 4}, "the images have 2 x 2 patches"),
        ({"momentum": 1.5}, "momentum is 1.5"),
        ({"num_targets": 0}, "num_targets"),
    ],
)
def test_impossible_values_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_ijepa(**changes)


def test_backbones_without_patches_and_with_a_class_token_as_features_are_refused() -> None:
    with pytest.raises(ValueError, match="TinyNet has no patch tokens"):
        IJEPA(TinyNet(), image_size=8)
    with pytest.raises(ValueError, match=r"set backbone\.pool=mean"):
        IJEPA(vit(), image_size=8)
