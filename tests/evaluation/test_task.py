"""Images, preprocessing and starts of an evaluation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from learnable import Colors, start_of, task_of
from sslcli.data.views.views import Views
from sslcli.errors import ConfigError
from sslcli.evaluation.task import Task
from tiny import TinyNet


@pytest.fixture
def task() -> Task:
    return task_of(Colors())


def test_images_are_normalized_with_the_constants_of_pretraining(task: Task) -> None:
    task = replace(task, mean=(0.5, 0.25, 0.0), std=(0.5, 1.0, 2.0))
    images = torch.full((1, 3, 2, 2), 0.5)
    torch.testing.assert_close(task.prepare(images)[0, :, 0, 0], torch.tensor([0.0, 0.25, 0.25]))


def test_images_have_the_color_space_of_pretraining(task: Task) -> None:
    lab = replace(task, views=Views([{"crop_scale": None}], color_space="lab", normalize=False))
    white = lab.prepare(torch.ones(1, 3, 2, 2))
    assert not torch.allclose(white, torch.ones(1, 3, 2, 2))
    torch.testing.assert_close(white[:, 1], white[:, 2], rtol=0, atol=0.05)  # white has no color


def test_the_example_is_a_preprocessed_batch_of_black_images(task: Task) -> None:
    task = replace(task, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    assert torch.equal(task.example(), torch.full((2, 3, 8, 8), -1.0))


def test_there_is_no_teacher_and_no_cache_by_default(task: Task) -> None:
    with pytest.raises(ConfigError, match="'finetune'"):
        task.fine_tuned("finetune")
    assert task.kept("random", lambda: {"top1": 0.25}) == {"top1": 0.25}


def test_a_classifier_is_a_copy_with_a_layer_of_zeros(task: Task) -> None:
    start = start_of(TinyNet(), task)
    classifier = start.classifier(task)
    assert (classifier.classify.in_features, classifier.classify.out_features) == (8, 3)
    assert not classifier.classify.weight.any()
    with torch.no_grad():
        for parameter in classifier.parameters():
            parameter.add_(1.0)
    assert start.net is not None
    assert not any(
        torch.equal(one, other) for one, other in zip(start.net.parameters(), classifier.net.parameters(), strict=True)
    )


def test_the_width_of_a_classifier_may_be_given(task: Task) -> None:
    assert start_of(TinyNet(), task).classifier(task, width=5).classify.in_features == 5
