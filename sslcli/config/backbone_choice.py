"""Settings of a backbone by the name of its yaml file, for Python functions, which compose no configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sslcli.config import schema
from sslcli.config.folders import conf_folder
from sslcli.config.plugins import plugin_folders
from sslcli.errors import ConfigError, nearest

UNKNOWN_SIZE = 224  # image size in pixels if neither a dataset nor the weight file states it


def backbone_node(choice: str, *, image_size: int, channels: int = 3) -> dict[str, Any]:
    """Return the settings of a backbone, as `backbone=CHOICE` gives them on a command line.

    Args:
        choice: name of a yaml file of `conf/backbone`, and changes of its keys: "resnet50 stem=imagenet". The keys may
            begin with `backbone.`, as on a command line.
        image_size: side of the images in pixels.
        channels: number of channels of the images.

    Raises ConfigError if there is no such file or key, or if a value is invalid.
    """
    name, *changes = choice.split() or [""]
    folders = [*plugin_folders().values(), conf_folder() or Path()]
    files = {path.stem: path for folder in folders for path in folder.glob("backbone/*.yaml")}
    if name not in files:
        known = ", ".join(sorted(files))
        raise ConfigError(f"backbone is {name!r}, but there is no such choice.{nearest(name, files)} Known: {known}")
    try:
        changed = OmegaConf.from_dotlist([change.removeprefix("backbone.") for change in changes])
        node = OmegaConf.merge(OmegaConf.load(files[name]), changed)
        images = {"image_size": image_size, "channels": channels}
        config = OmegaConf.create({"dataset": images, "method": {}, "backbone": node})
        found = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"backbone is {choice!r}: {str(error).splitlines()[0]}") from error
    assert isinstance(found, dict)
    schema.check_group("backbone", found["backbone"])
    return dict(found["backbone"])
