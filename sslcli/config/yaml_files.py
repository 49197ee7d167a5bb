"""Reading and writing of yaml files with OmegaConf, for packages that do not import it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from sslcli.errors import ConfigError


def load_yaml(path: Path) -> Any:
    """Return the content of a yaml file as plain values, interpolations unresolved. Raise ConfigError if unreadable."""
    try:
        return OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (YAMLError, OmegaConfBaseException, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path} cannot be read ({reason}): restore a copy, or choose another directory") from error


def as_yaml(content: dict[str, Any]) -> str:
    """Return plain values as yaml text."""
    return OmegaConf.to_yaml(OmegaConf.create(content))
