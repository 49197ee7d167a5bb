"""Validation of the `hydra` node of a configuration. The node may name only trusted code.

Hydra instantiates the classes that `hydra.callbacks` names. Optuna's sweeper instantiates the class of its `sampler`,
and Python's logging instantiates the configured handlers. Other modules check only the classes that are named as
`_target_` outside of the `hydra` node.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from omegaconf import DictConfig, ListConfig
from omegaconf.errors import OmegaConfBaseException

from sslcli.config.plugins import plugins
from sslcli.errors import ConfigError

ALLOWED = (  # (dotted key inside `hydra`, names allowed there besides trusted packages), as regular expressions
    (r"(launcher|sweeper)\._target_", r"hydra_plugins\.[\w.]+|hydra\._internal\.core_plugins\.[\w.]+"),
    (r"sweeper\.(sampler|pruner)\._target_", r"optuna\.(samplers|pruners)\.\w+"),
    (
        r"(job|hydra)_logging\..*",
        r"logging\.(handlers\.)?\w*(Handler|Formatter|Filter)|colorlog\.ColoredFormatter|ext://sys\.std(out|err)",
    ),
)
SECTIONS = ("callbacks", "launcher", "sweeper", "job_logging", "hydra_logging")  # sections that name code
CALLED = ("_target_", "()", "class", "queue", "listener", "custom_search_space")  # keys whose values name code


def check_hydra(own: Any, trust: Iterable[str]) -> None:
    """Raise ConfigError if the `hydra` node of a configuration names code outside of Hydra and trusted packages.

    `own` is the node as plain values. `trust` are the names of the packages that the user trusts.
    """
    packages = [*plugins(), *trust]
    for path, name in named_code("", own):
        allowed = any(re.fullmatch(place, path) and re.fullmatch(names, name) for place, names in ALLOWED)
        if not allowed and not any(name.removeprefix("ext://").startswith(f"{package}.") for package in packages):
            raise ConfigError(
                f"hydra.{path} is {name!r}, which Hydra would call, but it is not in a trusted package: remove it. "
                f"If you know that package, add trust=[{name.removeprefix('ext://').split('.')[0]}]"
            )


def resolved(node: Any, only: Iterable[str] | None = None) -> Any:
    """Return an OmegaConf node as plain values. An interpolation that cannot be resolved is left unchanged.

    Args:
        node: OmegaConf node, or a plain value.
        only: keys of a mapping to return; None = all.
    """
    if not isinstance(node, (DictConfig, ListConfig)):
        return node
    found: dict[Any, Any] = {}
    keys: Iterable[Any] = node if isinstance(node, DictConfig) else range(len(node))
    included: Iterable[Any] = keys if only is None else [key for key in only if key in node]
    for key in included:
        try:
            found[key] = resolved(node[key])
        except OmegaConfBaseException:
            found[key] = str(node._get_node(key))
    return found


def is_reference(path: str, text: str) -> bool:
    """Return True if the string `text` can refer to code, such as a class, that Hydra or Python's logging calls.

    `path` is the dotted key of the string inside the `hydra` node. The result is True for `ext://` references in the
    configuration of logging, and for unresolved interpolations in callbacks.
    """
    if path.partition(".")[0] == "callbacks":
        return "${" in text
    return path.startswith(("job_logging.", "hydra_logging.")) and text.startswith("ext://")


def named_code(where: str, value: Any) -> Iterator[tuple[str, str]]:
    """Yield (dotted key, string) for every string that names code (a class or function) that Hydra or logging calls.

    `value` is the `hydra` node of a configuration, or a part of it. `where` is the dotted key of this part.
    """
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        path = f"{where}.{key}" if where else str(key)
        if isinstance(inner, str) and (
            is_reference(path, inner) or (key in CALLED and ("." in inner or "${" in inner))
        ):
            yield path, inner
        else:
            yield from named_code(path, inner)
