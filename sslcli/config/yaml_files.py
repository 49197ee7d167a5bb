"""Parsing and writing of yaml text, for packages of sslcli that must not import OmegaConf themselves."""

from __future__ import annotations

import io
import math
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

MAX_VALUES = 100_000  # maximum number of values of a document after each alias is replaced by its content


def parse_yaml(text: str) -> Any:
    """Return the content of yaml text as plain values. Interpolations such as `${seed}` are not resolved.

    Raises ValueError if the text cannot be parsed, or if its aliases expand to more than `MAX_VALUES` values.
    """
    try:
        if "*" in text and "&" in text:
            _check_aliases(text)
        return OmegaConf.to_container(OmegaConf.load(io.StringIO(text)), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException, OSError, ValueError) as error:
        raise ValueError(" ".join(str(error).replace('in "<file>", ', "at ").split())) from error
    except RecursionError as error:
        raise ValueError("its values are nested too deeply") from error


def _check_aliases(text: str) -> None:
    """Raise ValueError if the aliases of a yaml document expand to more than `MAX_VALUES` values."""
    counts: dict[int, float] = {}

    def count(node: yaml.Node) -> float:
        if id(node) not in counts:
            counts[id(node)] = math.inf  # if an alias is inside its own anchor, the expansion never ends
            if isinstance(node, yaml.MappingNode):
                inner = [part for pair in node.value for part in pair]
            else:
                inner = node.value if isinstance(node, yaml.SequenceNode) else []
            counts[id(node)] = 1 + sum(map(count, inner))
        return counts[id(node)]

    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if root is not None and count(root) > MAX_VALUES:
        raise ValueError(f"its aliases expand to more than {MAX_VALUES:,} values")


def as_yaml(content: dict[str, Any]) -> str:
    """Return plain values as yaml text."""
    return OmegaConf.to_yaml(OmegaConf.create(content))
