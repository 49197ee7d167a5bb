"""Settings of a backbone by its name."""

from __future__ import annotations

import pytest

from command_line import composed
from sslcli.config.backbone_choice import backbone_node
from sslcli.errors import ConfigError


@pytest.mark.parametrize("choice", ["resnet18 stem=imagenet", "vit_tiny backbone.patch_size=8 backbone.registers=4"])
def test_the_settings_are_those_of_a_command_line(choice: str) -> None:
    name, *changes = choice.split()
    changes = [f"backbone.{change.removeprefix('backbone.')}" for change in changes]
    line = [f"backbone={name}", *changes, "dataset=flat", "dataset.root=.", "dataset.image_size=64"]
    assert backbone_node(choice, image_size=64) == composed("train", *line)["backbone"]


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("resnet19", "Did you mean 'resnet18'"),
        ("", "there is no such choice"),
        ("resnet18 stam=imagenet", "Did you mean 'stem'"),
        ("timm", "name"),
    ],
)
def test_wrong_choices_are_refused(choice: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        backbone_node(choice, image_size=32)
