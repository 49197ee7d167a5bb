from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sslcli.backbones import Backbone, as_backbone


def vectors() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 5, 3, stride=2), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(5 * 7 * 7, 11))


def maps() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Dropout(0.5))


class Named(nn.Module):
    def __init__(self, num_features: object) -> None:
        super().__init__()
        self.num_features = num_features
        self.layer = nn.Linear(3, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.layer(images.mean((2, 3)))


class Counts(nn.Module):
    """Changes a buffer and draws random numbers in every mode."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, images: Tensor) -> Tensor:
        self.seen += len(images)
        return images.flatten(1) + torch.rand(())


class Gives(nn.Module):
    def __init__(self, make: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.make = make

    def forward(self, images: Tensor) -> object:
        return self.make(images)


def test_vectors_are_used_as_they_are() -> None:
    module = vectors().eval()
    backbone = as_backbone(module, image_size=16)
    images = torch.randn(3, 3, 16, 16)
    assert isinstance(backbone, Backbone)
    assert backbone.num_features == 11
    assert torch.equal(backbone(images), module(images))


def test_maps_are_averaged_over_positions() -> None:
    module = maps().eval()
    backbone = as_backbone(module, image_size=16)
    images = torch.randn(3, 3, 16, 16)
    assert backbone.num_features == 6
    torch.testing.assert_close(backbone(images), module(images).flatten(2).mean(2))


def test_a_module_without_parameters_and_with_other_channels_works() -> None:
    assert as_backbone(nn.AvgPool2d(4), image_size=8, in_channels=7).num_features == 7


def test_parameters_of_the_module_are_trained() -> None:
    backbone = as_backbone(vectors(), image_size=16)
    backbone(torch.randn(4, 3, 16, 16)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in backbone.parameters())


@pytest.mark.parametrize("make", [vectors, maps, Counts])
def test_the_dry_forward_leaves_state_mode_and_randomness_alone(make: Callable[[], nn.Module]) -> None:
    module = make().train()
    for part in module.children():
        if isinstance(part, nn.BatchNorm2d):
            part.eval()  # one that the user froze must stay frozen
    modes = [part.training for part in module.modules()]
    state = {name: value.clone() for name, value in module.state_dict().items()}
    objects = {name: id(value) for name, value in module.named_buffers()}
    random = torch.get_rng_state()
    as_backbone(module, image_size=16)
    assert [part.training for part in module.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert {name: id(value) for name, value in module.named_buffers()} == objects
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in module.parameters())


def test_a_module_that_says_its_width_is_returned_itself() -> None:
    module = Named(4)
    assert as_backbone(module, image_size=8) is module  # type: ignore[comparison-overlap]


@pytest.mark.parametrize("declared", [5, 4.0, "4", None])
def test_a_module_that_says_a_wrong_width_is_wrapped(declared: object) -> None:
    backbone = as_backbone(Named(declared), image_size=8)
    assert backbone.num_features == 4
    assert backbone(torch.zeros(2, 3, 8, 8)).shape == (2, 4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: x.flatten(2), r"Gives returns shape \(2, 3, 64\)"),
        (lambda x: x.sum(), r"Gives returns shape \(\)"),
        (lambda x: x.flatten(), r"shape \(384,\)"),
        (lambda x: x.reshape(4, -1), r"shape \(4, 96\)"),
        (lambda x: {"out": x}, r"returns a dict, .*returns the tensor"),
        (lambda x: (x, x), "returns a tuple"),
    ],
)
def test_other_outputs_are_refused_naming_them(make: Callable[[Tensor], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        as_backbone(Gives(make), image_size=8)


def test_a_module_for_another_image_size_is_refused_and_left_as_it_was() -> None:
    module = vectors().train()
    with pytest.raises(ValueError, match=r"Sequential does not accept images of shape \(2, 3, 32, 32\).*image_size"):
        as_backbone(module, image_size=32)
    assert all(part.training for part in module.modules())


def test_the_dry_forward_runs_in_evaluation_mode_without_gradient() -> None:
    seen = []

    class Records(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            seen.append((self.training, torch.is_grad_enabled()))
            return images

    as_backbone(Records().train(), image_size=8)
    assert seen == [(False, False)]
