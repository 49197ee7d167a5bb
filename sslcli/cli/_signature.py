"""What a `_target_` of sslcli takes, read from its source text, so that a typo is found without importing torch."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

INJECTED = ("backbone", "num_images")  # what the commands pass to a method themselves


@dataclass(frozen=True)
class Parameter:
    """One keyword of a constructor: its annotation as written, and whether it must be given."""

    annotation: str
    required: bool


@lru_cache
def parameters_of(target: str) -> dict[str, Parameter] | None:
    """Keywords of a class or function of sslcli by name; None where the source is not ours or cannot be found."""
    module, _, name = target.rpartition(".")
    if module.split(".")[0] != "sslcli":
        return None
    tree = _tree(module)
    return None if tree is None else _parameters(tree, name)


def _tree(module: str) -> ast.Module | None:
    root = find_spec("sslcli")
    assert root is not None and root.submodule_search_locations is not None
    stem = Path(root.submodule_search_locations[0]).joinpath(*module.split(".")[1:])
    for path in (stem.with_suffix(".py"), stem / "__init__.py"):
        if path.exists():
            return ast.parse(path.read_text(encoding="utf-8"))
    return None


def _parameters(tree: ast.Module, name: str) -> dict[str, Parameter] | None:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return _arguments(node.args, skip=0)
        if isinstance(node, ast.ClassDef) and node.name == name:
            return _class(tree, node)
        if isinstance(node, ast.ImportFrom) and node.module and any(alias.name == name for alias in node.names):
            return parameters_of(f"{node.module}.{name}")
    return None


def _class(tree: ast.Module, node: ast.ClassDef) -> dict[str, Parameter]:
    found: dict[str, Parameter] = {}
    init = next((part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == "__init__"), None)
    if init is None or init.args.kwarg is not None:
        for base in node.bases:
            if isinstance(base, ast.Name):
                found |= _parameters(tree, base.id) or {}
    if init is not None:
        return found | _arguments(init.args, skip=1)
    for part in node.body:
        if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
            found[part.target.id] = Parameter(ast.unparse(part.annotation), required=part.value is None)
    return found


def _arguments(arguments: ast.arguments, *, skip: int) -> dict[str, Parameter]:
    plain = arguments.args[skip:]
    required = len(plain) - len(arguments.defaults)
    found = {}
    for place, argument in enumerate(plain):
        found[argument.arg] = Parameter(_text(argument), required=place < required)
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        found[argument.arg] = Parameter(_text(argument), required=default is None)
    return found


def _text(argument: ast.arg) -> str:
    return "Any" if argument.annotation is None else ast.unparse(argument.annotation)


def fits(value: Any, annotation: str) -> bool:
    """Whether a yaml value can be meant for a parameter; annotations we do not know fit anything."""
    options = [option.strip() for option in annotation.split("|")]
    if value is None:
        return "None" in options or "Any" in annotation or "Optional" in annotation
    return any(_fits_one(value, option) for option in options if option != "None")


def _fits_one(value: Any, option: str) -> bool:
    known = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}
    if option in known:
        return isinstance(value, known[option]) and (option == "bool" or not isinstance(value, bool))
    if option.startswith(("list", "tuple", "Sequence")):
        return isinstance(value, (list, tuple))
    if option.startswith(("dict", "Mapping")):
        return isinstance(value, dict)
    return True
