from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from golden_cases import Case, golden_cases
from one_run import finish, make_run
from processes import Pair
from sslcli.engine.clipping import clip_gradients
from sslcli.errors import TrainingFailed
from sslcli.methods.base import Batch
from sslcli.methods.dino import DINO, centered, cross_entropy_of_views, teacher_temperature_at
from sslcli.nn.schedule import cosine, warmup_cosine
from sslcli.report.metrics import read
from tiny import TinyNet, copied_state, mine, multi_crop_batch


def tiny_dino(**changes: Any) -> DINO:
    values = {"num_prototypes": 12, "dim": 4, "hidden": 10, "num_views": 4}
    return DINO(TinyNet(norm=False), **(values | changes))


def check_steps(case: Case, epochs: list[int]) -> None:
    params = case.params
    center = torch.zeros(case.inputs["student"].shape[2], dtype=case.dtype)
    losses, centers, gradients, temperatures = [], [], [], []
    for step, epoch in enumerate(epochs):
        student = case.inputs["student"][step].unflatten(0, (params["crops"], -1)).requires_grad_()
        teacher = case.inputs["teacher"][step].unflatten(0, (2, -1))
        temperature = teacher_temperature_at(
            epoch, start=params["warmup_teacher_temp"], end=params["teacher_temp"], epochs=params["warmup_epochs"]
        )
        target = centered(teacher, center, temperature)
        loss = cross_entropy_of_views(student, target, temperature=params["student_temp"])
        loss.backward()
        assert student.grad is not None
        center = params["center_momentum"] * center + (1 - params["center_momentum"]) * teacher.mean((0, 1))
        losses.append(loss.detach())
        centers.append(center)
        gradients.append(student.grad.flatten(0, 1))
        temperatures.append(torch.tensor(temperature))
    case.check(losses, "loss")
    case.check(centers, "center")
    case.check(gradients, "grad_student")
    case.check(temperatures, "teacher_temp")


@golden_cases("dino_a")
def test_losses_and_centers_equal_the_official_code(case: Case) -> None:
    check_steps(case, list(range(case.params["steps"])))


@golden_cases("dino_multicrop")
def test_losses_of_views_of_several_sizes_equal_the_official_code(case: Case) -> None:
    check_steps(case, case.params["epoch_of_step"])


class OfficialNet(nn.Module):
    """The backbone of the recorded steps: a linear layer on the mean over pixels."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.lin = nn.Linear(3, num_features)
        self.num_features = num_features

    def forward(self, images: Tensor) -> Tensor:
        return self.lin(images.mean((2, 3)))


@golden_cases("dino_steps")
def test_training_steps_equal_the_official_code(case: Case) -> None:
    x, params = case.inputs, case.params
    method = DINO(
        OfficialNet(params["D"]),
        num_prototypes=params["K"],
        dim=params["bottleneck"],
        hidden=params["hidden"],
        layers=2,
        num_views=params["crops"],
        trained_gain=not params["norm_last_layer"],
        momentum=params["momentum_teacher"],
        temperature=params["student_temp"],
        teacher_temperature=params["teacher_temp"],
        warmup_teacher_temperature=params["warmup_teacher_temp"],
        warmup_teacher_temperature_epochs=params["warmup_teacher_temp_epochs"],
        center_momentum=params["center_momentum"],
    ).to(case.dtype)
    initial = {name.removeprefix("init."): value for name, value in x.items() if name.startswith("init.")}
    missing, unexpected = method.load_state_dict(
        initial | {f"teacher_{name}": value for name, value in initial.items()}, strict=False
    )
    assert unexpected == []
    assert not any("weight_v" in name or "mlp" in name for name in missing)
    decayed = [p for p in method.parameters() if p.requires_grad and p.ndim > 1]
    plain = [p for p in method.parameters() if p.requires_grad and p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed}, {"params": plain, "weight_decay": 0.0}], lr=1.0, betas=tuple(params["betas"])
    )
    per_epoch, total = params["iters_per_epoch"], params["epochs"] * params["iters_per_epoch"]
    warmup = params["warmup_epochs"] * per_epoch
    states: dict[str, list[Tensor]] = {name: [] for name in case.outputs}
    for step in range(total):
        # The official schedules: the warm-up reaches the peak at its last step, and the peak is repeated.
        if step < warmup:
            lr = params["lr"] * step / (warmup - 1)
        else:
            rest = warmup_cosine(step - warmup, total=total - warmup, final=params["min_lr"] / params["lr"])
            lr = params["lr"] * rest
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.param_groups[0]["weight_decay"] = cosine(
            step / total, start=params["weight_decay"], end=params["weight_decay_end"]
        )
        epoch = step // per_epoch
        method.before_step(step / total, float(epoch))
        views = [*x["global"][step], *x["local"][step]]
        loss = method(Batch(views, torch.arange(params["N"]), torch.arange(params["N"])))["loss"]
        loss.backward()
        clip_gradients(method, params["clip_grad"], by="tensor")
        if epoch < params["freeze_last_layer"]:
            method.head.last_layer.weight_v.grad = None
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(step / total)
        now = copied_state(method)
        for name in states:
            part = name.removeprefix("student.").replace("teacher.", "teacher_")
            states[name].append(loss.detach() if name == "loss" else now[part])
    for name, values in states.items():
        case.check(values, name)


def test_equal_logits_cost_the_logarithm_of_the_number_of_prototypes() -> None:
    target = centered(torch.zeros(2, 3, 12), torch.zeros(12), 0.04)
    loss = cross_entropy_of_views(torch.zeros(4, 3, 12), target, temperature=0.1)
    assert float(loss) == pytest.approx(math.log(12))


def test_order_of_the_first_two_views_does_not_matter() -> None:
    student, target = torch.randn(4, 3, 5), torch.randn(2, 3, 5).softmax(2)
    swapped = cross_entropy_of_views(student[[1, 0, 2, 3]], target[[1, 0]], temperature=0.1)
    torch.testing.assert_close(swapped, cross_entropy_of_views(student, target, temperature=0.1))


def test_a_view_is_not_compared_with_itself() -> None:
    student = torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True)
    target = torch.zeros(2, 2, 5, dtype=torch.float64)
    target[0] = torch.randn(2, 5, dtype=torch.float64).softmax(1)  # only the first view has a target
    cross_entropy_of_views(student, target, temperature=0.1).backward()
    assert student.grad is not None
    assert not student.grad[0].any()
    assert student.grad[1].any()
    assert student.grad[2].any()


def test_center_is_updated_after_the_loss() -> None:
    method, batch = tiny_dino(), multi_crop_batch()
    teacher = method.teacher_logits(batch.views[:2])
    loss = method(batch)["loss"]
    assert not method.center.any()
    method.after_step(0.0)
    torch.testing.assert_close(method.center, 0.1 * teacher.mean((0, 1)))
    method.center.zero_()
    with torch.no_grad():
        torch.testing.assert_close(method(batch)["loss"], loss.detach(), rtol=1e-4, atol=1e-4)
    without = tiny_dino(centering=False)
    without(batch)
    without.after_step(0.0)
    assert not without.center.any()


def test_teacher_is_evaluated_and_follows_the_student() -> None:
    method, batch = tiny_dino(momentum=0.9), multi_crop_batch()
    images = batch.views[0]
    torch.testing.assert_close(method.features(images), method.backbone(images))
    method(batch)["loss"].backward()
    assert all(p.grad is None for p in method.teacher_backbone.parameters())
    with torch.no_grad():
        for parameter in method.backbone.parameters():
            parameter.add_(1.0)
    before = copy.deepcopy(method.teacher_backbone)
    method.after_step(0.0)
    for now, old in zip(method.teacher_backbone.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(now, old + 0.1)
    torch.testing.assert_close(method.features(images), method.teacher_backbone(images))


def shapes(run_dir: Path, *overrides: str) -> list[dict[str, float]]:
    """Train on shapes for 80 steps with a fast teacher, and return the lines of metrics with health metrics."""
    finish(make_run(
        run_dir, "method=dino", "method.num_views=2", "views=simclr_cifar", "method.hidden=64", "method.dim=32",
        "method.num_prototypes=64", "method.momentum=0.9", "method.final_momentum=0.9", "dataset.image_size=16",
        "method.freeze_last_layer_epochs=0", "optimizer.lr=5e-3", "train.clip_grad=null", "train.max_steps=80",
        "train.save_every_epochs=0", "monitor.health_every_steps=10", "monitor.on_collapse=stop", *overrides,
    ))  # fmt: skip
    return [line for line in read(run_dir / "metrics.jsonl") if "health/std" in line]


def test_without_centering_all_images_get_one_prototype_and_the_guard_says_so(tmp_path: Path) -> None:
    with pytest.raises(TrainingFailed, match=r"collapsed at step (50|60|70|80): assignment_information .*no centering"):
        shapes(tmp_path, "method.centering=false")
    last = [line for line in read(tmp_path / "metrics.jsonl") if "health/std" in line][-1]
    assert last["health/assignment_information"] < 0.01
    assert last["health/std"] > 0.2 / 32**0.5  # the limit of the guard: the vectors before the prototypes still differ
    assert last["health/rankme"] > 8


def test_with_centering_the_assignments_differ_and_the_guard_is_silent(tmp_path: Path) -> None:
    lines = shapes(tmp_path)
    assert [line["step"] for line in lines] == [1, *range(10, 90, 10)]
    assert min(line["health/assignment_information"] for line in lines) > 0.5


def test_prototypes_are_frozen_at_the_start() -> None:
    assert tiny_dino(freeze_last_layer_epochs=2).group_options() == {"head.last_layer": {"frozen_epochs": 2}}


def test_teacher_temperature_is_constant_in_an_epoch_and_ends_at_its_final_value() -> None:
    found = [teacher_temperature_at(epoch, start=0.04, end=0.07, epochs=4) for epoch in (0, 0.5, 1, 2, 3, 9)]
    assert found == pytest.approx([0.04, 0.04, 0.05, 0.06, 0.07, 0.07])
    assert teacher_temperature_at(0, start=0.04, end=0.07, epochs=0) == 0.07
    assert [teacher_temperature_at(epoch, start=0.04, end=0.07, epochs=1) for epoch in (0, 0.9, 1)] == [
        0.04,
        0.04,
        0.07,
    ]


def test_global_views_of_two_sizes_are_refused() -> None:
    small, large = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 8, 8)
    tiny_dino().check_views([large, large, small, small])
    with pytest.raises(ValueError, match="the first two views have"):
        tiny_dino().check_views([large, small, small, small])


def losses_and_center(batch: Batch) -> tuple[Tensor, Tensor, list[Tensor]]:
    torch.manual_seed(0)
    method = tiny_dino().double()
    losses = []
    for step in range(2):
        loss = method(mine(batch))["loss"]
        losses.append(loss.detach())
        method.zero_grad()
        loss.backward()
        method.after_step(step / 2)
    gradients = [p.grad for p in method.parameters() if p.grad is not None]
    return torch.stack(losses), method.center, gradients


def test_two_processes_compute_the_loss_center_and_gradient_of_the_whole_batch(pair: Pair) -> None:
    batch = multi_crop_batch()
    batch = Batch([view.double() for view in batch.views], batch.index, batch.label)
    losses, center, gradients = losses_and_center(batch)
    first, second = pair.run(losses_and_center, batch)
    torch.testing.assert_close((first[0] + second[0]) / 2, losses)
    torch.testing.assert_close(first[1], center)
    for one, other, whole in zip(first[2], second[2], gradients, strict=True):
        torch.testing.assert_close((one + other) / 2, whole)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_views": 1}, "num_views is 1"),
        ({"teacher_temperature": 0.0}, "temperature is 0.0"),
        ({"momentum": 1.5}, "momentum is 1.5"),
        ({"num_prototypes": 0}, "num_prototypes"),
        ({"freeze_last_layer_epochs": -1}, "freeze_last_layer_epochs is -1"),
    ],
)
def test_impossible_values_are_refused(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_dino(**changes)
