"""Reading and writing of yaml files, for packages that must not import OmegaConf."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from sslcli.errors import ConfigError


def load_yaml(path: Path) -> Any:
    """Return the content of a yaml file as plain values, without resolving interpolations.

    Raises ConfigError if the file cannot be read.
    """
    try:
        return OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (YAMLError, OmegaConfBaseException, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path} cannot be read ({reason}): restore a copy, or choose another directory") from error


def as_yaml(content: dict[str, Any]) -> str:
    """Return plain values as yaml text."""
    return OmegaConf.to_yaml(OmegaConf.create(content))
