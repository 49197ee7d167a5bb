"""Typed reading of files that sslcli wrote earlier.

All code that reads such files uses this module. The content of a JSON or yaml file is compared with a shape: a
dataclass or a TypedDict. The fields of a shape are the required and optional keys of the file, with their types. If the
content of a damaged file cannot be recomputed, `DamagedFile` is raised. Its message names the file, the damage and the
remedy. If the content can be recomputed, the file is renamed (set aside), and a warning is printed.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints, is_typeddict

from sslcli.config.annotations import fits, words
from sslcli.config.yaml_files import parse_yaml
from sslcli.errors import ConfigError
from sslcli.system.regular_files import read_regular

MAX_JSON = 256_000_000  # bytes
MAX_YAML = 4_000_000  # bytes; the largest configurations have about 100 kB
MAX_SHOWN = 60  # characters of a value in a message
PLAIN = (int, float, bool, str, list, dict, type(None))
T = TypeVar("T")


class DamagedFile(ConfigError):
    """Raised for a stored file (a file that sslcli wrote earlier) whose content is not what sslcli writes.

    Args:
        path: the file.
        reason: what is wrong with its content.
        remedy: what the user can do. The message ends with it.
    """

    def __init__(self, path: Path, reason: str, remedy: str) -> None:
        super().__init__(f"{path} is damaged ({reason}): {remedy}")
        self.path, self.reason = path, reason


def read_bytes(path: Path, *, remedy: str, most: int = MAX_JSON) -> bytes:
    """Return the content of a stored file, which sslcli wrote earlier.

    Args:
        path: the file.
        remedy: what the user can do if the file cannot be read. The error message ends with it.
        most: maximum size in bytes.

    Raises FileNotFoundError if there is no such file. Raises ConfigError if the file cannot be opened or is too large.
    """
    try:
        return read_regular(path, most=most)
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(os.fspath(path)) from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror or error}): {remedy}") from error


def read_text(path: Path, *, remedy: str, most: int = MAX_JSON) -> str:
    """Return the text of a stored file. For the arguments and errors, see `read_bytes`.

    In addition, raises DamagedFile if the file is not UTF-8.
    """
    content = read_bytes(path, remedy=remedy, most=most)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DamagedFile(path, f"byte {error.start} is not UTF-8", remedy) from error


def read_line(path: Path, pattern: str, *, what: str, remedy: str) -> str | None:
    """Return the text of a stored file that contains only one value. Return None if there is no such file.

    Spaces around the text are removed.

    Args:
        path: the file.
        pattern: regular expression. DamagedFile is raised unless it matches the whole text.
        what: phrase for the value, for the error message, as in "an exit code".
        remedy: what the user can do. The error message ends with it.
    """
    try:
        text = read_text(path, remedy=remedy).strip()
    except FileNotFoundError:
        return None
    if not re.fullmatch(pattern, text):
        raise DamagedFile(path, f"its content is {shown(text)}, but it must be {what}", remedy)
    return text


def read_json(path: Path, shape: type[T], *, remedy: str) -> T:
    """Return the content of a stored JSON file. Raises DamagedFile unless the content has the given shape.

    `shape` is a dataclass or a TypedDict that declares the keys and their types. For `path`, `remedy` and further
    errors, see `read_bytes`.
    """
    text = read_text(path, remedy=remedy)
    if not text.strip("\0 \r\n\t"):
        raise DamagedFile(path, "it is empty", remedy)
    try:
        content = json.loads(text)
    except ValueError as error:
        raise DamagedFile(path, f"it is not JSON: {error}", remedy) from error
    except RecursionError as error:
        raise DamagedFile(path, "its values are nested too deeply", remedy) from error
    return checked(content, shape, path, remedy=remedy)


def read_yaml(path: Path, shape: type[T], *, remedy: str) -> T:
    """Return the content of a stored yaml file. Raises DamagedFile unless the content has the given shape.

    `shape` is a dataclass or a TypedDict that declares the keys and their types. For `path`, `remedy` and further
    errors, see `read_bytes`.
    """
    text = read_text(path, remedy=remedy, most=MAX_YAML)
    try:
        content = parse_yaml(text)
    except ValueError as error:
        raise DamagedFile(path, str(error), remedy) from error
    return checked(content, shape, path, remedy=remedy)


def checked(content: Any, shape: type[T], path: Path, *, remedy: str) -> T:
    """Check the content of the stored file `path`, and return it. Raises DamagedFile unless it has the given shape.

    `shape` is a dataclass or a TypedDict that declares the keys and their types. `remedy` is what the user can do; the
    error message ends with it.

    If the shape is a dataclass, an instance of it is returned. Keys that are not fields of the dataclass are ignored,
    because a newer version may have written them.
    """
    wrong = mismatch(content, shape)
    if wrong:
        raise DamagedFile(path, wrong, remedy)
    if is_dataclass(shape):
        names = {field.name for field in fields(shape)}
        return shape(**{key: value for key, value in content.items() if key in names})
    found: T = content
    return found


def mismatch(value: Any, kind: Any, where: str = "") -> str:
    """Return a description of the first difference between a value and a type, or "" if the value has the type.

    Args:
        value: the value to check. It consists of tensors and plain values (numbers, texts, lists, mappings, None).
        kind: the required type. It is a shape (a dataclass or TypedDict that declares keys), another class, or an
            annotation of plain values such as `list[int]`. In an annotation, the items of a `list` and the values of a
            `dict` may also be shapes or classes.
        where: dotted key of the value, for the description.
    """
    name = where or "its content"
    if _is_shape(kind):
        if not isinstance(value, dict):
            return f"{name} is {shown(value)}, but it must be a mapping of keys to values"
        required, hints = _fields_of(kind)
        for key, inner in hints.items():
            here = f"{where}.{key}" if where else key
            if key not in value:
                if key in required:
                    return f"it has no {here}"
            elif wrong := mismatch(value[key], inner, here):
                return wrong
        return ""
    arguments = get_args(kind)
    if get_origin(kind) in (list, dict) and _is_class(arguments[-1]):
        outer = get_origin(kind)
        if not isinstance(value, outer):
            return f"{name} is {shown(value)}, but it must be a {'list' if outer is list else 'mapping'}"
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return next((wrong for key, one in items if (wrong := mismatch(one, arguments[-1], f"{where}.{key}"))), "")
    if _is_class(kind):
        return "" if isinstance(value, kind) else f"{name} is {shown(value)}, but it must be a {kind.__name__}"
    annotation = kind.__name__ if isinstance(kind, type) and get_origin(kind) is None else str(kind)
    return "" if fits(value, annotation) else f"{name} is {shown(value)}, but it must be {words(annotation)}"


def shown(value: Any) -> str:
    """Return a value as text for a message.

    A long text is truncated. An object is described by the name of its class.
    """
    if not isinstance(value, PLAIN):
        return f"a {type(value).__name__}"
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def _is_class(kind: Any) -> bool:
    """Return True if `kind` is a class other than the types of plain values, and False for any other annotation.

    The types of plain values are int, float, bool, str, list, dict and None. An example of another annotation is
    `list[int]`.
    """
    return get_origin(kind) is None and isinstance(kind, type) and kind is not Any and kind not in PLAIN


def _is_shape(kind: Any) -> bool:
    return is_typeddict(kind) or (isinstance(kind, type) and is_dataclass(kind))


@cache
def _fields_of(shape: Any) -> tuple[frozenset[str], dict[str, Any]]:
    """Return the names of the required fields of a dataclass or TypedDict, and the types of all of its fields."""
    hints = get_type_hints(shape)
    if is_typeddict(shape):
        return shape.__required_keys__, hints
    required = (field.name for field in fields(shape) if field.default is MISSING and field.default_factory is MISSING)
    return frozenset(required), hints


def read_or_set_aside(read: Callable[[], T], *, warn: Callable[[str], None], consequence: str) -> T | None:
    """Return the result of `read`, or None if the file does not exist or cannot be used.

    If the file is damaged, it is renamed. A warning names the file, its new name, and the consequence for the user.

    Args:
        read: function that reads a stored file. It must call a reading function of this module, such as `read_json`.
        warn: function that prints a warning.
        consequence: what happens without the file, as in "it is computed again". The warning ends with it.
    """
    try:
        return read()
    except FileNotFoundError:
        return None
    except DamagedFile as error:
        warn(f"{error.path} is damaged ({error.reason}){renamed(set_aside(error.path))}: {consequence}")
    except ConfigError as error:
        warn(f"{error}. {consequence[:1].upper()}{consequence[1:]}")
    return None


def set_aside(path: Path) -> Path | None:
    """Rename a damaged file to an unused name beside it. Return the new path, or None if this is not possible."""
    names = [f"{path.name[:200]}.damaged{suffix}" for suffix in ("", *(f"-{number}" for number in range(2, 100)))]
    for target in map(path.with_name, names):
        if os.path.lexists(target):
            continue
        try:
            os.rename(path, target)
        except OSError:  # the folder is read-only, or another process has renamed the file
            return None
        return target
    return None


def renamed(target: Path | None) -> str:
    """Return the part of a message that states the new name of a damaged file.

    `target` is the new path of the file. If it is None, the file was not renamed, and "" is returned.
    """
    return "" if target is None else f" and is now named {target.name}"
