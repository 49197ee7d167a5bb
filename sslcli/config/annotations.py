"""Type checks of yaml values against annotations, and descriptions of annotations in words.

Annotations are given as text, such as `"int | None"`.
"""

from __future__ import annotations

import ast
import math
from functools import lru_cache
from typing import Any

LISTS = ("list", "List", "Sequence", "Iterable", "tuple", "Tuple")
MAPPINGS = ("dict", "Dict", "Mapping")
PATHS = ("Path", "PathLike")
WORDS = {
    "int": ("an integer", "integers"),
    "float": ("a finite number", "finite numbers"),
    "bool": ("true or false", "booleans"),
    "str": ("a string", "strings"),
    "Path": ("a path", "paths"),
    "PathLike": ("a path", "paths"),
    "None": ("null", "null"),
}


def fits(value: Any, annotation: str) -> bool:
    """Return True if a value fits the annotation of a parameter.

    Every value fits an annotation that this module does not know, such as the name of a class. A union of a known type
    and a class accepts values of the known type, and mappings, which may describe an instance of the class.
    """
    return _fits(value, _parse(annotation)) is not False


def words(annotation: str) -> str:
    """Return an annotation in plain words: `int | None` -> `an integer or null`."""
    return _words(_parse(annotation), many=False)


@lru_cache
def _parse(annotation: str) -> ast.expr:
    try:
        tree = ast.parse(annotation, mode="eval").body
    except SyntaxError:
        return ast.Name("Any")
    if isinstance(tree, ast.Constant) and isinstance(tree.value, str):  # a quoted annotation
        return _parse(tree.value)
    return tree


def _options(node: ast.expr) -> list[ast.expr]:
    """Return the members of a union. If the annotation is not a union, return a list with only the annotation."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return [*_options(node.left), *_options(node.right)]
    if isinstance(node, ast.Subscript) and _name(node) == "Optional":
        return [*_options(node.slice), ast.Constant(None)]
    if isinstance(node, ast.Subscript) and _name(node) == "Union":
        return [option for part in _arguments(node) for option in _options(part)]
    return [node]


def _name(node: ast.expr) -> str:
    """Return the name of a type without its package and its brackets: `typing.List[int]` -> `List`."""
    node = node.value if isinstance(node, ast.Subscript) else node
    return "None" if isinstance(node, ast.Constant) else ast.unparse(node).rpartition(".")[2]


def _arguments(node: ast.expr) -> list[ast.expr]:
    if not isinstance(node, ast.Subscript):
        return []
    return list(node.slice.elts) if isinstance(node.slice, ast.Tuple) else [node.slice]


def _fits(value: Any, node: ast.expr) -> bool | None:
    """Return True if the value fits the annotation, False if not, and None if it is unknown whether the value fits.

    This is unknown for annotations other than plain types, lists and mappings, such as the name of a class.
    """
    found = [_fits_one(value, option) for option in _options(node)]
    if True in found:
        return True
    if False in found:  # unknown annotations are classes; in yaml, only a mapping can describe an instance
        return None if None in found and isinstance(value, dict) else False
    return None


def _fits_one(value: Any, node: ast.expr) -> bool | None:
    name, inside = _name(node), _arguments(node)
    if name in ("Any", "object"):
        return True
    if name == "None":
        return value is None
    if name == "Literal":
        return value in [part.value for part in inside if isinstance(part, ast.Constant)]
    if name in PATHS:
        return isinstance(value, str)
    if name in ("int", "float", "bool", "str"):
        return _is_plain(value, name)
    if name in LISTS:
        return isinstance(value, (list, tuple)) and _fit_all(list(value), name, inside)
    if name in MAPPINGS:
        return isinstance(value, dict) and (len(inside) < 2 or _fit_all(list(value.values()), "list", inside[1:]))
    return None


def _is_plain(value: Any, name: str) -> bool:
    if name == "float":
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if name == "int":
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, bool if name == "bool" else str)


def _fit_all(values: list[Any], name: str, inside: list[ast.expr]) -> bool:
    """Return True if the values of a list or tuple fit `inside`, the annotations in the brackets of the type `name`.

    For list[int], `name` is "list", and all values must fit the only annotation, int. For tuple[int, str], there must
    be two values: the first must fit int, and the second must fit str.
    """
    if not inside:
        return True
    if name.lower() != "tuple" or (len(inside) == 2 and ast.unparse(inside[1]) == "..."):
        return all(_fits(value, inside[0]) is not False for value in values)
    if len(values) != len(inside):
        return False
    return all(_fits(value, part) is not False for value, part in zip(values, inside, strict=True))


def _words(node: ast.expr, *, many: bool) -> str:
    """Describe an annotation in words, in the plural if `many` is True.

    If a union contains types that a command line can set, such as `int`, the other types of the union are omitted.
    """
    options = _options(node)
    plain = [option for option in options if _name(option) in (*WORDS, *LISTS, *MAPPINGS, "Literal")]
    has_paths = any(_name(option) in PATHS for option in options)
    shown = [option for option in plain or options if not (has_paths and _name(option) == "str")]
    return " or ".join(_words_of_one(option, many=many) for option in shown)


def _words_of_one(node: ast.expr, *, many: bool) -> str:
    name, inside = _name(node), _arguments(node)
    if name in WORDS:
        return WORDS[name][many]
    if name == "Literal":
        return " or ".join(ast.unparse(part) for part in inside)
    if name in LISTS:
        exact = name.lower() == "tuple" and "..." not in map(ast.unparse, inside)
        start = "lists of" if many else "a list of"
        return f"{start} {f'{len(inside)} ' if exact and inside else ''}" + (
            _words(inside[0], many=True) if inside else "values"
        )
    if name in MAPPINGS:
        of = f" to {_words(inside[1], many=True)}" if len(inside) == 2 and _name(inside[1]) != "Any" else ""
        return ("mappings" if many else "a mapping") + of
    return ast.unparse(node)
