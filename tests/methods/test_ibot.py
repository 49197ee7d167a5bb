from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from golden_cases import Case, golden_cases
from processes import Pair
from sslcli.distributed.collectives import all_gather, rank
from sslcli.methods.base import Batch
from sslcli.methods.dino import DINO, centered, cross_entropy_of_views, teacher_temperature_at
from sslcli.methods.ibot import IBOT, cross_entropy_of_patches, patch_weights
from tiny import TinyNet, mine, multi_crop_batch, vit


def tiny_ibot(**changes: Any) -> IBOT:
    values = {"image_size": 8, "num_prototypes": 12, "dim": 4, "hidden": 10, "num_views": 4}
    return IBOT(vit(), **(values | changes))


@golden_cases("ibot_loss")
def test_losses_and_centers_equal_the_official_code(case: Case) -> None:
    x, params = case.inputs, case.params
    center, patch_center = torch.zeros(2, params["K"], dtype=case.dtype).unbind()
    found: dict[str, list[Tensor]] = {name: [] for name in case.outputs}
    for step, epoch in enumerate(params["epoch_of_step"]):
        inputs = [x[name][step].clone().requires_grad_() for name in ("student_cls", "student_patch", "student_local")]
        student_class, student_patch, student_local = inputs
        mask = x["mask"][step].flatten(2).bool()
        teacher, patches = x["teacher_cls"][step].unflatten(0, (2, -1)), x["teacher_patch"][step].unflatten(0, (2, -1))
        temperatures = [
            teacher_temperature_at(
                epoch, start=params[f"warmup_{name}"], end=params[name], epochs=params["warmup_epochs"]
            )
            for name in ("teacher_temp", "teacher_temp2")
        ]
        student = torch.cat([student_class, student_local]).unflatten(0, (2 + params["local_crops"], -1))
        target = centered(teacher, center, temperatures[0])
        whole = params["lambda1"] * cross_entropy_of_views(student, target, temperature=params["student_temp"])
        parts = params["lambda2"] * cross_entropy_of_patches(
            student_patch.flatten(0, 1),
            centered(patches, patch_center, temperatures[1]).flatten(0, 2),
            patch_weights(mask, case.dtype),
            temperature=params["student_temp"],
        )
        (whole + parts).backward()
        center = center.lerp(teacher.mean((0, 1)), 1 - params["center_momentum"])
        patch_center = patch_center.lerp(patches.mean((0, 1, 2)), 1 - params["center_momentum2"])
        values = {"cls": whole, "patch": parts, "loss": whole + parts, "center": center, "center2": patch_center}
        values |= {
            f"grad_{name}": value.grad
            for name, value in zip(("student_cls", "student_patch", "student_local"), inputs, strict=True)
        }
        for name, value in values.items():
            found[name].append(value.detach())
    for name, values_of_steps in found.items():
        case.check(values_of_steps, name)


def test_without_masks_the_loss_is_that_of_dino() -> None:
    torch.manual_seed(0)
    method = tiny_ibot(mask_ratios=(0.0,), mask_variations=(0.0,), teacher_temperature=0.04, center_momentum=0.9)
    batch = multi_crop_batch()
    dino = DINO(vit(), num_prototypes=12, dim=4, hidden=10, num_views=4)
    dino.load_state_dict({k: v for k, v in method.state_dict().items() if k in dino.state_dict()})
    found, expected = method(batch), dino(batch)
    torch.testing.assert_close(found["loss"], expected["loss"], rtol=1e-6, atol=1e-6)
    assert float(found["patch_loss"]) == 0.0


def test_patches_that_are_not_masked_get_no_gradient() -> None:
    student = torch.randn(2, 3, 5, 6, requires_grad=True)
    mask = torch.rand(2, 3, 5) < 0.5
    target = torch.randn(30, 6).softmax(1)
    cross_entropy_of_patches(student.flatten(0, 2), target, patch_weights(mask), temperature=0.1).backward()
    assert student.grad is not None
    assert not student.grad[~mask].any()
    assert student.grad[mask].any(1).all()


def test_equal_logits_cost_the_logarithm_of_the_prototypes_for_each_view_with_a_mask() -> None:
    mask = torch.tensor([[[True, False], [False, False]], [[True, True], [True, False]]])  # 3 of 4 views
    logits, target = torch.zeros(8, 12), torch.full((8, 12), 1 / 12)
    loss = cross_entropy_of_patches(logits, target, patch_weights(mask), temperature=0.1)
    assert float(loss) == pytest.approx(0.75 * math.log(12))


def test_masked_patches_are_hidden_from_the_student_and_not_from_the_teacher() -> None:
    method = tiny_ibot(mask_ratios=(0.5,), mask_variations=(0.0,)).eval()
    batch = multi_crop_batch()
    mask = method.draw_masks(8, torch.device("cpu"))[0]
    images = batch.views[0]
    hidden = mask.view(-1, 4, 4).repeat_interleave(2, 1).repeat_interleave(2, 2)[:, None]
    changed = torch.where(hidden, images + 1, images)
    tokens = [method.backbone.tokens(x, mask=mask, mask_token=method.mask_token)[0] for x in (images, changed)]
    torch.testing.assert_close(tokens[0], tokens[1])
    teacher = [method.teacher_tokens([x, *batch.views[1:]])[1] for x in (images, changed)]
    assert not torch.allclose(teacher[0], teacher[1])


def test_half_of_the_views_have_no_mask_with_the_official_ratios() -> None:
    masks = tiny_ibot().draw_masks(500, torch.device("cpu"))
    empty = ~masks.any(2)
    assert 0.4 < float(empty.float().mean()) < 0.65
    assert int(masks.sum(2).max()) <= 8


def test_both_centers_are_updated_after_the_loss() -> None:
    method, batch = tiny_ibot(), multi_crop_batch()
    teacher, patches = method.teacher_tokens(batch.views)
    method(batch)
    assert not method.center.any()
    method.after_step(0.0)
    torch.testing.assert_close(method.center, 0.1 * teacher.mean((0, 1)))
    torch.testing.assert_close(method.patch_center, 0.1 * patches.mean(0))


def losses_and_masks(batch: Batch) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    torch.manual_seed(0)
    method = tiny_ibot().double()
    masks = method.draw_masks(len(mine(batch).index), torch.device("cpu"))
    masks = all_gather(masks.transpose(0, 1).contiguous())
    losses = []
    for step in range(2):
        loss = method(mine(batch))["loss"]
        losses.append(loss.detach())
        method.zero_grad()
        loss.backward()
        method.after_step(step / 2)
    return torch.stack(losses), masks, method.patch_center, [p.grad for p in method.parameters() if p.grad is not None]


def test_two_processes_compute_the_masks_loss_center_and_gradient_of_the_whole_batch(pair: Pair) -> None:
    batch = multi_crop_batch(dtype=torch.float64)
    losses, masks, center, gradients = losses_and_masks(batch)
    first, second = pair.run(losses_and_masks, batch)
    torch.testing.assert_close((first[0] + second[0]) / 2, losses)
    assert torch.equal(first[1], masks)
    torch.testing.assert_close(first[2], center)
    for one, other, whole in zip(first[3], second[3], gradients, strict=True):
        torch.testing.assert_close((one + other) / 2, whole)
    assert rank() == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_ratios": (0.3,), "mask_variations": (0.4,)}, "mask ratio 0.3 with the variation 0.4"),
        ({"mask_ratios": (0.3,)}, "each ratio needs a variation"),
        ({"patch_teacher_temperature": 0.0}, "temperature is 0.0"),
    ],
)
def test_impossible_values_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_ibot(**changes)


def test_backbones_without_patches_and_other_sizes_of_views_are_refused() -> None:
    with pytest.raises(ValueError, match="TinyNet has no patch tokens: choose backbone=vit_tiny"):
        IBOT(TinyNet(), image_size=8)
    small, large = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 8, 8)
    tiny_ibot().check_views([large, large, small, small])
    with pytest.raises(ValueError, match="the first two views have"):
        tiny_ibot().check_views([small, large, small])
    with pytest.raises(ValueError, match="the local views have the sizes"):
        tiny_ibot().check_views([large, large, small, large])
