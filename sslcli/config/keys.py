"""Validation of dotted keys against a composed configuration and the constructors that it names."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, OmegaConf

from sslcli.config import schema
from sslcli.config.signatures import GIVEN, INJECTED, parameters_of
from sslcli.errors import ConfigError


def check_path(command: str, path: str, base: DictConfig, *, signed: bool) -> None:
    """Raise ConfigError for a key that neither the yaml nor the constructor knows."""
    node: Any = base
    walked = ""
    for part in path.split("."):
        if OmegaConf.is_list(node):
            if not part.isdigit() or int(part) >= len(node):
                raise ConfigError(f"{path}: {walked} is a list of {len(node)}, counted from 0")
            inside, part = node, int(part)  # type: ignore[assignment]
        elif OmegaConf.is_dict(node):
            check_name(command, part, node, walked)
            if part not in set(node):  # `in` alone does not see a value that is asked for (???)
                if signed:
                    return
                raise ConfigError(f"{path}: the yaml leaves it out. To add it: +{path}=...")
            inside = node
        else:
            first = ". Choose a mixture first: mixture=..." if walked == "method.mixture" else ""
            raise ConfigError(f"{path}: {walked} is a value of its own, with no keys below it{first}")
        if OmegaConf.is_missing(inside, part) or OmegaConf.is_interpolation(inside, part):
            return  # not known before the values are set
        node = inside._get_node(part)
        walked = f"{walked}.{part}" if walked else str(part)


def check_name(command: str, name: str, node: DictConfig, where: str) -> None:
    """Raise ConfigError unless a mapping has, or its constructor takes, a key of this name."""
    known = {str(key) for key in node} - {"hydra"}
    target = node.get("_target_") if where else None
    parameters = parameters_of(target) if isinstance(target, str) else None
    if name in known or name in (parameters or ()) or (target is not None and parameters is None):
        return  # a class whose signature cannot be read decides when it is built
    if not where:
        known |= set(schema.GROUPS[command])
    known |= set(parameters or ()) - {*INJECTED, *GIVEN}
    free = where and target is None and where.partition(".")[0] in schema.BUILT
    hint = f". To add a key that the yaml leaves out: +{where}.{name}=..." if free else ""
    raise ConfigError(schema.unknown(where, name, known - {"_target_"}) + hint)
