"""Validation of dotted keys such as `method.temperature`.

A key is valid in two cases: the composed configuration contains it, or it is a parameter of the class that `_target_`
names in the same mapping.
"""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, OmegaConf

from sslcli.config import schema
from sslcli.config.messages import unknown_message
from sslcli.config.signatures import METHOD_ARGUMENTS, OPTIMIZER_ARGUMENTS, parameters_of
from sslcli.errors import ConfigError


def check_path(command: str, path: str, base: DictConfig, *, may_add: bool) -> None:
    """Raise ConfigError unless a dotted key is in the composed configuration, or may be added to it.

    Args:
        command: "train", "eval", "embed" or "export".
        path: the dotted key, such as `method.temperature`.
        base: the composed configuration.
        may_add: True for overrides that begin with `+`, `++` or `~`. The key may then be missing in `base`, if the
            constructor of the class that `_target_` names has a parameter with this name.
    """
    node: Any = base
    walked = ""
    for part in path.split("."):
        if OmegaConf.is_list(node):
            if not part.isdigit() or int(part) >= len(node):
                raise ConfigError(
                    f"{path}: {walked} is a list of length {len(node)}, so {part!r} is not an index (the first is 0)"
                )
            inside, part = node, int(part)  # type: ignore[assignment]
        elif OmegaConf.is_dict(node):
            check_name(command, part, node, walked)
            if part not in set(node):  # `part in node` is False for a mandatory value (???)
                if may_add:
                    return
                raise ConfigError(f"{path} is not in the yaml. To add it, write +{path}=...")
            inside = node
        else:
            first = ". Choose a mixture first: mixture=..." if walked == "method.mixture" else ""
            raise ConfigError(f"{path}: {walked} is a single value and has no keys{first}")
        if OmegaConf.is_missing(inside, part) or OmegaConf.is_interpolation(inside, part):
            return  # the keys of a mandatory value (???) or an interpolation are not known yet
        node = inside._get_node(part)
        walked = f"{walked}.{part}" if walked else str(part)


def check_name(command: str, name: str, node: DictConfig, where: str) -> None:
    """Raise ConfigError unless `name` is a key of the mapping `node` or a parameter of the class in its `_target_`.

    If the parameters of this class cannot be determined, any name is accepted.

    Args:
        command: "train", "eval", "embed" or "export".
        name: the key to check.
        node: mapping in a composed configuration.
        where: dotted key of the mapping, or "" for the whole configuration.
    """
    known = {str(key) for key in node} - {"hydra"}
    target = node.get("_target_") if where else None
    parameters = parameters_of(target) if isinstance(target, str) else None
    if name in known or name in (parameters or ()) or (target is not None and parameters is None):
        return  # `name` is valid, or the signature cannot be read and the constructor checks its arguments later
    if not where:
        known |= set(schema.GROUPS[command])
    known |= set(parameters or ()) - {*METHOD_ARGUMENTS, *OPTIMIZER_ARGUMENTS}
    free = where and target is None and where.partition(".")[0] in schema.BUILT
    hint = f". To add a key that is not in the yaml, write +{where}.{name}=..." if free else ""
    raise ConfigError(unknown_message(where, name, known - {"_target_"}) + hint)
