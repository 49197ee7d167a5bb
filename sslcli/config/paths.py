"""Absolute paths in a composed configuration, so that a run means the same folders from any working directory."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sslcli.config.signatures import names_in_annotations
from sslcli.errors import ConfigError

PLAIN = {"train": ("run_dir",), "eval": ("run", "weights"), "export": ("run", "out")}  # path keys outside of groups
PATH_TYPES = frozenset(["Path", "PurePath", "PosixPath", "PathLike", "Root"])  # names that make a parameter a path
HUB_NAME = "HubName"  # in an annotation: a name on the Hugging Face hub, unless such a folder or file exists

_HOME = re.compile(r"(?:^|(?<=[\[{,\s]))~[\w./@%+*?-]*(?: +[\w./@%+*?-]+)*(?=$|[\]},\s])")  # words of a path included
_HOME_KEY = re.compile(r"(?<=[{,\s])~[\w./@%+-]*(?=\s*:)")

Convert = Callable[[str], str]


def absolute_paths(command: str, config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with `~` expanded and every path absolute; URLs and names on the hub stay.

    Raises ConfigError for a `~` that cannot be expanded.
    """
    changed: dict[str, Any] = in_nodes(config, absolute)
    for key in PLAIN[command]:
        if isinstance(changed.get(key), str):
            changed[key] = absolute(changed[key])
    return changed


def quoted_home(line: str) -> str:
    """An override with quotes around every path that begins with `~`, which Hydra does not read without.

    Keys of mappings, which Hydra reads only without quotes, are expanded.
    """
    key, equals, value = line.partition("=")
    if '"' in value or "'" in value:
        return line
    value = _HOME_KEY.sub(lambda found: os.path.expanduser(found[0]), value)
    return key + equals + _HOME.sub(r'"\g<0>"', value)


def in_nodes(value: Any, convert: Convert) -> Any:
    """A copy of a configuration in which `convert` is applied to the path parameters of every `_target_`."""
    if isinstance(value, list):
        return [in_nodes(inner, convert) for inner in value]
    if not isinstance(value, dict):
        return value
    keys = path_keys(value)
    return {
        key: _converted(inner, _for_hub(convert) if keys.get(key) else convert)
        if key in keys
        else in_nodes(inner, convert)
        for key, inner in value.items()
    }


def path_keys(node: dict[str, Any]) -> dict[str, bool]:
    """The keys of a node that are paths, and whether each may be a name on the hub instead."""
    target = node.get("_target_")
    names = names_in_annotations(target) if isinstance(target, str) else {}
    return {key: HUB_NAME in found for key, found in names.items() if key in node and found & PATH_TYPES}


def paths_of(node: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Key and path of every path in a node and in the nodes inside it."""
    for key in path_keys(node):
        found: list[str] = []
        _converted(node[key], lambda text, found=found: found.append(text) or text)  # type: ignore[misc]
        yield from ((key, path) for path in found)


def same_paths(one: Any, other: Any) -> bool:
    """Whether two configurations are equal, paths being equal if they lead to the same place from here."""
    return bool(in_nodes(one, real) == in_nodes(other, real))


def without_paths(config: Any) -> Any:
    """The configuration with its paths replaced by their number, to compare all but where things are."""
    number = itertools.count()
    return in_nodes(config, lambda text: f"path {next(number)}")


def absolute(path: str) -> str:
    """The absolute form of a path, `~` and `~user` expanded; URLs, fsspec chains and the empty text stay.

    `..` behind a symbolic link leads to the parent of what it links to, also where the end of the path is still to be
    made. The result holds no `..`, since much code drops it together with the name before it.
    """
    if not path or "://" in path or "::" in path:
        return path
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise ConfigError(
            f"{path!r} begins with {expanded.split('/')[0]!r}, but no such home directory is known: write the whole "
            f"path, or ./{path} for a folder of that name"
        )
    whole = os.path.join(os.getcwd(), expanded)
    parts = Path(whole).parts
    if ".." not in parts:
        return os.path.normpath(whole)
    end = len(parts) - parts[::-1].index("..")
    start = os.path.join(*parts[:end])
    short = os.path.normpath(start)
    is_same = not os.path.exists(start) or (os.path.exists(short) and os.path.samefile(start, short))
    return os.path.join(short if is_same else os.path.realpath(start), *parts[end:])


def real(path: str) -> str:
    """The absolute form of a path without symbolic links, to compare it."""
    whole = absolute(path)
    return os.path.realpath(whole) if os.path.isabs(whole) else whole


def _for_hub(convert: Convert) -> Convert:
    """Applied only to what is a path and no name on the hub."""

    def local(text: str) -> str:
        is_path = text.startswith(("/", ".", "~")) or os.path.exists(text)
        return convert(text) if is_path else text

    return local


def _converted(value: Any, convert: Convert) -> Any:
    """A path, the paths of a list, the values of a mapping that are paths, or else its keys (path -> weight)."""
    if isinstance(value, str):
        return convert(value)
    if isinstance(value, list):
        return [_converted(inner, convert) for inner in value]
    if not isinstance(value, dict) or "_target_" in value:
        return in_nodes(value, convert)
    if any(isinstance(inner, (str, list)) for inner in value.values()):
        return {key: _converted(inner, convert) for key, inner in value.items()}
    return {convert(str(key)): inner for key, inner in value.items()}
