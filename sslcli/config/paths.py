"""Conversion of paths in a composed configuration to absolute paths, and comparison of paths.

With absolute paths, a configuration does not depend on the working directory. A node is a mapping whose key `_target_`
names a class. The annotations of the constructor of this class determine which values of the node are paths.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from sslcli.config.signatures import names_in_annotations
from sslcli.errors import ConfigError

PLAIN = {  # path keys outside of groups
    "train": ("run_dir", "init", "teacher"),
    "eval": ("run", "weights"),
    "embed": ("run", "weights", "images", "out"),
    "export": ("run", "out"),
}
SOURCES_OF_WEIGHTS = ("run:", "timm:")  # starts of weights= and init=: the path of a run, the name of a timm model
NAMES = {"train": ("name",)}  # keys whose values name directories
PATH_TYPES = frozenset(["Path", "PurePath", "PosixPath", "PathLike", "Root"])  # types of path parameters
HUB_NAME = "HubName"  # annotation of a Hugging Face hub name; the value may also be a path that exists

_HOME = re.compile(r"(?:^|(?<=[\[{,\s]))~[\w./@%+*?-]*(?: +[\w./@%+*?-]+)*(?=$|[\]},\s])")  # a path may have spaces
_HOME_KEY = re.compile(r"(?<=[{,\s])~[\w./@%+-]*(?=\s*:)")

Convert = Callable[[str], str]


def absolute_paths(command: str, config: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration with `~` expanded and every path absolute.

    URLs and Hugging Face hub names are not changed.

    `command` is train, eval, embed or export. Raises ConfigError if a `~` cannot be expanded.
    """
    changed: dict[str, Any] = map_paths(config, absolute)
    for key in PLAIN[command]:
        if isinstance(changed.get(key), str):
            changed[key] = convert_source(changed[key], absolute)
        elif isinstance(changed.get(key), list):
            changed[key] = [absolute(path) for path in changed[key]]
    return changed


def numbers_as_text(command: str, config: dict[str, Any], lines: Iterable[str] = ()) -> dict[str, Any]:
    """Return the configuration with numbers replaced by text where a path or a name is expected.

    Hydra and yaml files read `dataset.root=2023` as a number, but a folder may have this name.

    Args:
        command: train, eval, embed or export.
        config: plain values.
        lines: overrides of the command line. If one of them sets a number, the text is taken from this override.
            Therefore `dataset.root=1e3` gives "1e3" and not "1000.0".
    """
    written = {key.lstrip("+"): text.strip() for key, _, text in (line.partition("=") for line in lines)}
    changed = {key: _numbers_as_text(value, key, written) for key, value in config.items()}
    for key in (*PLAIN[command], *NAMES.get(command, ())):
        if key in changed:
            changed[key] = _text(changed[key], key, written)
    return changed


def _numbers_as_text(value: Any, where: str, written: dict[str, str]) -> Any:
    """Replace numbers by text in the path parameters of all nodes (mappings with a `_target_`) inside `value`.

    `where` is the dotted key of `value`. `written` maps each dotted key that the command line sets to the text of its
    value.
    """
    if isinstance(value, list):
        return [_numbers_as_text(inner, where, written) for inner in value]
    if not isinstance(value, dict):
        return value
    keys = path_keys(value)
    return {
        key: _text(inner, f"{where}.{key}", written)
        if key in keys
        else _numbers_as_text(inner, f"{where}.{key}", written)
        for key, inner in value.items()
    }


def _text(value: Any, where: str, written: dict[str, str]) -> Any:
    """Replace the numbers in the value of a path parameter by text.

    The value may be a path, a list of paths, or a mapping. The paths of a mapping are its values if any of them is a
    string or a list. Otherwise, its paths are its keys, as in a mapping from folders to sampling weights.

    `where` is the dotted key of the value. `written` maps each dotted key that the command line sets to the text of its
    value.
    """
    if isinstance(value, list):
        return [_text(inner, "", written) for inner in value]
    if isinstance(value, dict):
        if "_target_" in value:
            return _numbers_as_text(value, where, written)
        has_paths = any(isinstance(inner, (str, list)) for inner in value.values())
        return {
            key if has_paths else _text(key, "", written): _text(inner, "", written) if has_paths else inner
            for key, inner in value.items()
        }
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return written.get(where, str(value)) if is_number else value


def quote_home_paths(line: str) -> str:
    """Return an override with quotes around every path that begins with `~`, since Hydra rejects an unquoted `~`.

    Hydra also rejects quotes in the keys of a mapping such as `{~/images: 1}`. In these keys, `~` is expanded instead.
    """
    key, equals, value = line.partition("=")
    if '"' in value or "'" in value:
        return line
    value = _HOME_KEY.sub(lambda found: os.path.expanduser(found[0]), value)
    return key + equals + _HOME.sub(r'"\g<0>"', value)


def map_paths(value: Any, convert: Convert) -> Any:
    """Return a copy of a configuration with `convert` applied to every path.

    A node is a mapping with the key `_target_`, which names a class. Each other key of a node is a parameter of this
    class. The value of a key is a path if the class annotates the parameter as a path.
    """
    if isinstance(value, list):
        return [map_paths(inner, convert) for inner in value]
    if not isinstance(value, dict):
        return value
    keys = path_keys(value)
    return {
        key: _convert(inner, _for_hub(convert) if keys.get(key) else convert)
        if key in keys
        else map_paths(inner, convert)
        for key, inner in value.items()
    }


def path_keys(node: dict[str, Any]) -> dict[str, bool]:
    """Return the keys of `node` whose values are paths.

    Each key is mapped to True if its value may also be the name of a data set or model on the Hugging Face hub.

    `node` is a mapping with a `_target_`. A value is a path if the class that `_target_` names annotates it as a path.
    """
    target = node.get("_target_")
    names = names_in_annotations(target) if isinstance(target, str) else {}
    return {key: HUB_NAME in found for key, found in names.items() if key in node and found & PATH_TYPES}


def paths_of(node: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (key, path) for every path in a node, a mapping with a `_target_`.

    If the value of a key is a list or a mapping that contains several paths, one pair is yielded for each path.
    """
    for key in path_keys(node):
        found: list[str] = []
        _convert(node[key], lambda text, found=found: found.append(text) or text)  # type: ignore[misc]
        yield from ((key, path) for path in found)


def same_paths(one: Any, other: Any) -> bool:
    """Return True if two configurations are equal when their paths are resolved.

    Two different paths are equal if they refer to the same file or folder, for example through a symbolic link.
    """
    return bool(map_paths(one, real_path) == map_paths(other, real_path))


def without_paths(config: Any) -> Any:
    """Return a copy of a configuration in which the paths are replaced by "path 0", "path 1" and so on.

    If two configurations differ only in their paths, their copies are equal.
    """
    number = itertools.count()
    return map_paths(config, lambda text: f"path {next(number)}")


def absolute(path: str) -> str:
    """Return the absolute form of a path, with `~` and `~user` expanded.

    URLs, URL chains of fsspec (`zip::s3://...`) and "" are not changed.

    If `..` follows a symbolic link, it means the parent of the link's target, even if the part of the path after
    `..` does not exist yet. The result contains no `..`, because other code often resolves `..` by removing the
    preceding name. If the preceding name is a symbolic link, this gives a wrong path.

    Raises ConfigError if the home directory is unknown.
    """
    if not path or "://" in path or "::" in path:
        return path
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise ConfigError(
            f"{path!r} begins with {expanded.split('/')[0]!r}, but that home directory is unknown: write the full "
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


def convert_source(text: str, convert: Convert) -> str:
    """Apply `convert` to the path in `text`. `run:DIR` keeps its start, and `timm:NAME` is not changed."""
    run, timm = SOURCES_OF_WEIGHTS
    if text.startswith(timm):
        return text
    return run + convert(text.removeprefix(run)) if text.startswith(run) else convert(text)


def results_dir_of(weights: str) -> Path:
    """Return the folder of the results of `weights`: FILE.eval beside a file, timm_NAME.eval for a timm model NAME."""
    name = weights.removeprefix(SOURCES_OF_WEIGHTS[1])
    path = Path(weights) if name == weights else Path("timm_" + re.sub(r"[^\w.-]", "_", name))
    return path.with_name(f"{path.name}.eval")


def real_path(path: str) -> str:
    """Return the absolute form of a path with symbolic links resolved, for comparisons."""
    whole = absolute(path)
    return os.path.realpath(whole) if os.path.isabs(whole) else whole


def _for_hub(convert: Convert) -> Convert:
    """Return a function that applies `convert` to paths and returns Hugging Face hub names unchanged.

    A text is a path if it begins with `/`, `.` or `~`, or if a file or folder with this name exists.
    """

    def local(text: str) -> str:
        is_path = text.startswith(("/", ".", "~")) or os.path.exists(text)
        return convert(text) if is_path else text

    return local


def _convert(value: Any, convert: Convert) -> Any:
    """Apply `convert` to the value of a path parameter: a path, a list of paths, or a mapping.

    If any value of a mapping is a string or a list, the values of the mapping are paths. Otherwise, the keys of the
    mapping are paths, as in a mapping from folders to sampling weights.
    """
    if isinstance(value, str):
        return convert(value)
    if isinstance(value, list):
        return [_convert(inner, convert) for inner in value]
    if not isinstance(value, dict) or "_target_" in value:
        return map_paths(value, convert)
    if any(isinstance(inner, (str, list)) for inner in value.values()):
        return {key: _convert(inner, convert) for key, inner in value.items()}
    return {convert(str(key)): inner for key, inner in value.items()}
