from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslcli.methods.distill import Distill, Teacher
from tiny import TinyNet, copied_state, equal_states, make_batch

SAME = {"mean": [0.5] * 3, "std": [0.25] * 3, "own_mean": [0.5] * 3, "own_std": [0.25] * 3}


def tiny(*, net: nn.Module | None = None, **changes: Any) -> Distill:
    teacher = Teacher(net or TinyNet(), **SAME)
    given = {"num_images": 48, "teacher_network": teacher, "teacher_features": 8, "mixup": False}
    return Distill(TinyNet(), **(given | changes))


def features(method: Distill, images: Tensor) -> tuple[Tensor, Tensor]:
    """Unit features of student and teacher."""
    return F.normalize(method.projection(images), dim=1), method.target(images)


def test_the_loss_is_the_divergence_of_the_similarities_to_the_batch_and_the_queue() -> None:
    method, batch = tiny(queue_size=12), make_batch(views=1)
    student, teacher = features(method, batch.views[0])
    keys = torch.cat([teacher, method.queue])
    target, found = (teacher @ keys.T / 0.07).softmax(1), (student @ keys.T / 0.07).log_softmax(1)
    expected = F.kl_div(found, target, reduction="batchmean")  # the loss of lightly-train
    scalars = method(batch)
    torch.testing.assert_close(scalars["loss"], expected)
    torch.testing.assert_close(scalars["similarity"], (student * teacher).sum(1).mean())
    trained = [parameter for parameter in method.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(expected, trained)
    scalars["loss"].backward()
    for parameter, gradient in zip(trained, gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_the_cosine_loss_needs_no_queue() -> None:
    method, batch = tiny(loss="cosine"), make_batch(views=1)
    student, teacher = features(method, batch.views[0])
    torch.testing.assert_close(method(batch)["loss"], (student - teacher).square().sum(1).mean())
    assert method.queue_length == 0


@pytest.mark.parametrize("loss", ["relations", "cosine"])
def test_a_student_with_the_features_of_the_teacher_has_no_loss(loss: str) -> None:
    method = tiny(loss=loss).eval()
    method.teacher.net.load_state_dict(method.backbone.state_dict())
    with torch.no_grad():
        method.head.weight.copy_(2 * torch.eye(8))
        method.head.bias.zero_()
    assert float(method(make_batch(views=1))["loss"].detach()) == pytest.approx(0, abs=1e-5)


def test_the_teacher_stays_as_it_is_and_follows_the_method_to_another_dtype() -> None:
    method, batch = tiny().train(), make_batch(views=1)
    teacher = method.teacher
    before = copied_state(teacher)
    method(batch)["loss"].backward()
    assert equal_states(teacher.state_dict(), before)
    assert not any(module.training for module in teacher.modules())
    assert not teacher.train().training
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(parameter.grad is not None for parameter in method.parameters() if parameter.requires_grad)
    assert not any("teacher" in name for name in method.state_dict())
    assert "teacher.net.conv.weight" in dict(method.named_parameters())
    tiny().load_state_dict(method.state_dict())
    with pytest.raises(RuntimeError, match=r"head\.bias"):
        tiny().load_state_dict({name: value for name, value in method.state_dict().items() if name != "head.bias"})
    method.double()
    assert {value.dtype for value in teacher.state_dict().values()} == {torch.float64, torch.int64}


def test_a_step_enqueues_the_features_of_the_teacher() -> None:
    method, batch = tiny(queue_size=12), make_batch(views=1)
    method(batch)
    before = method.queue.clone()
    method.after_step(0.0)
    assert torch.equal(method.queue[:8], method.target(batch.views[0]))
    assert torch.equal(method.queue[8:], before[8:])
    assert method.new_keys == []


def test_teacher_and_student_see_the_same_mixed_images() -> None:
    method, (images,) = tiny(mixup=True), make_batch(views=1).views
    seen = []
    for net in (method.backbone, method.teacher):
        net.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    method(make_batch(views=1))
    assert torch.equal(*seen)
    weights = (seen[0] - images.flip(0)) / (images - images.flip(0))
    weight = weights.flatten(1).median(1).values
    torch.testing.assert_close(seen[0], images.flip(0).lerp(images, weight.view(-1, 1, 1, 1)), rtol=0, atol=1e-5)
    assert len(weight.unique()) == len(images)
    assert all(0 <= value < 1 for value in weight.tolist())
    assert not torch.equal(method.mixed(images), seen[0])


def test_the_teacher_gets_images_with_its_own_normalization() -> None:
    net, raw = TinyNet(), torch.rand(4, 3, 8, 8)
    numbers = {name: torch.rand(3) + 0.2 for name in SAME}
    teacher = Teacher(copy.deepcopy(net), **{name: values.tolist() for name, values in numbers.items()})
    shaped = {name: values.view(3, 1, 1) for name, values in numbers.items()}
    found = teacher((raw - shaped["mean"]) / shaped["std"])
    torch.testing.assert_close(found, net.eval()((raw - shaped["own_mean"]) / shaped["own_std"]))
    assert not found.requires_grad


@pytest.mark.parametrize(
    ("num_images", "expected"), [(1, 1), (7, 1), (100, 16), (1000, 128), (20000, 4096), (50000, 8192), (10**6, 8192)]
)
def test_the_queue_is_at_most_a_quarter_of_the_images(num_images: int, expected: int) -> None:
    assert tiny(num_images=num_images).queue_length == expected
    assert expected <= max(1, num_images / 4)


def test_without_its_teacher_the_method_is_only_evaluated() -> None:
    method, images = tiny(teacher_network=None), make_batch(views=1).views[0]
    assert method.projection(images).shape == method.head(method.features(images)).shape == (8, 8)
    with pytest.raises(ValueError, match="without its teacher"):
        method.target(images)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"loss": "mse"}, "loss is 'mse', but it must be one of: relations, cosine"),
        ({"temperature": 0.0}, "temperature"),
        ({"queue_size": 0}, "queue_size"),
    ],
)
def test_wrong_values_are_refused(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        tiny(**changes)


def test_the_temperature_divides_the_similarities() -> None:
    batch = make_batch(views=1)
    torch.manual_seed(0)
    cold = tiny(queue_size=4)
    warm = copy.deepcopy(cold)
    warm.temperature = 100.0
    assert float(warm(batch)["loss"].detach()) < 1e-3 < float(cold(batch)["loss"].detach()) < math.inf
