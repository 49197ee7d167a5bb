"""Parameters of the class or function that the key `_target_` of a configuration names.

The parameters are read from the source text of the class, without importing torch or code of the user.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

METHOD_ARGUMENTS = (
    "backbone",
    "num_images",
    "image_size",
    "channels",
    "teacher_network",
    "teacher_features",
)  # arguments that the commands pass to a method; the yaml files do not contain them
OPTIMIZER_ARGUMENTS = ("params",)  # arguments that the commands pass to an optimizer
DEPTH = 8  # maximum number of imports and base classes to follow

Parameters = dict[str, "Parameter"]


@dataclass(frozen=True)
class Parameter:
    """One keyword of a constructor: the text of its annotation, and whether it is required (has no default)."""

    annotation: str
    required: bool


@lru_cache
def parameters_of(target: str) -> Parameters | None:
    """Return the keyword arguments of the class or function with the dotted name `target`.

    Returns None if the keywords cannot all be determined from the source text.
    """
    module, _, name = target.rpartition(".")
    return _find(module, name, DEPTH)


@lru_cache
def names_in_annotations(target: str) -> dict[str, frozenset[str]]:
    """Return the names of the types in the annotation of each keyword argument, as keyword -> names.

    `target` is the dotted name of a class or function. For `root: list[Path]`, the names are "list" and "Path". If an
    annotation uses a type alias, the names in the definition of the alias are added. The keywords of base classes are
    included.

    If a constructor has `**kwargs`, the result contains only the keywords that the source text declares.
    """
    module, _, name = target.rpartition(".")
    found: dict[str, frozenset[str]] = {}
    place = _definition(module, name, DEPTH)
    if place is None:
        return found
    module, node = place
    if isinstance(node, ast.ClassDef):
        for base in node.bases:
            above = names_in_annotations(f"{module}.{base.id}") if isinstance(base, ast.Name) else {}
            found |= {key: found.get(key, frozenset()) | names for key, names in above.items()}
    for key, annotation in _annotations(node):
        found[key] = found.get(key, frozenset()) | _names(annotation, module, DEPTH)
    return found


@lru_cache
def literal_defaults(target: str) -> dict[str, Any]:
    """Return the defaults of the keyword arguments of a class, as keyword -> default.

    `target` is the dotted name of the class. Keywords of base classes are included. A default is known only if it is a
    literal in the source text, such as 0.5, None or (1, 2). All other keywords are omitted.
    """
    module, _, name = target.rpartition(".")
    place = _definition(module, name, DEPTH)
    if place is None:
        return {}
    module, node = place
    found: dict[str, Any] = {}
    if isinstance(node, ast.ClassDef):
        for base in node.bases:
            found |= literal_defaults(f"{module}.{base.id}") if isinstance(base, ast.Name) else {}
    for key, default in _defaults(node):
        found.pop(key, None)
        with suppress(ValueError):
            found[key] = ast.literal_eval(default)
    return found


def _defaults(node: ast.stmt) -> Iterator[tuple[str, ast.expr]]:
    """Yield (name, default) for the annotated fields of a class and the arguments of its constructor.

    Fields and arguments without a default are skipped. If `node` is not a class, nothing is yielded.
    """
    for part in node.body if isinstance(node, ast.ClassDef) else ():
        if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name) and part.value is not None:
            yield part.target.id, part.value
        if isinstance(part, ast.FunctionDef) and part.name == "__init__":
            plain = [*part.args.posonlyargs, *part.args.args]
            pairs = [
                *zip(plain[len(plain) - len(part.args.defaults) :], part.args.defaults, strict=True),
                *zip(part.args.kwonlyargs, part.args.kw_defaults, strict=True),
            ]
            yield from ((argument.arg, default) for argument, default in pairs if default is not None)


def _annotations(node: ast.stmt) -> Iterator[tuple[str, ast.expr]]:
    """Yield (name, annotation) for each annotated argument of a function.

    If `node` is a class, yield (name, annotation) for each field and for each annotated argument of the constructor.
    """
    if isinstance(node, ast.FunctionDef):
        for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs):
            if argument.annotation is not None:
                yield argument.arg, argument.annotation
    elif isinstance(node, ast.ClassDef):
        for part in node.body:
            if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
                yield part.target.id, part.annotation
            elif isinstance(part, ast.FunctionDef) and part.name == "__init__":
                yield from _annotations(part)


def _names(annotation: ast.expr, module: str, depth: int) -> frozenset[str]:
    """Return the names of the types in an annotation. If a name is a type alias, add the names in its definition.

    `module` is the module in which the annotation occurs. `depth` is the maximum number of aliases and imports to
    follow.
    """
    found: set[str] = set()
    for node in ast.walk(annotation):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            with suppress(SyntaxError):
                found |= _names(ast.parse(node.value, mode="eval").body, module, depth)
        elif isinstance(node, ast.Name):
            found.add(node.id)
            place = _definition(module, node.id, depth)
            if place is not None and isinstance(place[1], (ast.Assign, ast.AnnAssign)) and place[1].value is not None:
                found |= _names(place[1].value, place[0], depth - 1)
    return frozenset(found)


def _definition(module: str, name: str, depth: int) -> tuple[str, ast.stmt] | None:
    """Return the module and the statement that define `name`, or None if no definition is found.

    `name` is searched in `module`. If `module` imports it, the import is followed, at most `depth` times.
    """
    tree = _tree(module)
    if tree is None or depth <= 0:
        return None
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == name:
            return module, node
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
            return module, node
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == name:
            return module, node
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return _definition(_absolute(module, node), alias.name, depth - 1)
    return None


def source_of(module: str) -> Path | None:
    """Return the source file of a module, or None if the file is not found. Nothing is imported."""
    package, *rest = module.split(".")
    try:
        spec = find_spec(package) if package else None
    except (ImportError, ValueError):
        return None
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return None
    stem = Path(spec.origin)
    if rest:
        if stem.name != "__init__.py":
            return None
        stem = stem.parent.joinpath(*rest)
    return next((path for path in (stem, stem.with_suffix(".py"), stem / "__init__.py") if path.is_file()), None)


@lru_cache
def _tree(module: str) -> ast.Module | None:
    path = source_of(module)
    if path is None:
        return None
    try:
        return ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, OSError):
        return None


def _find(module: str, name: str, depth: int) -> Parameters | None:
    """Return the keyword arguments of the class or function `name` in `module`.

    Return None if the source text is not found, or does not state all keywords (for example because of `**kwargs`).

    If `module` imports `name`, the import is followed. `depth` is the maximum number of imports and base classes to
    follow.
    """
    tree = _tree(module)
    if tree is None or depth == 0:
        return None
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return None if node.decorator_list or _accepts_any(node.args) else _arguments(node.args, skip=0)
        if isinstance(node, ast.ClassDef) and node.name == name:
            return _class(module, node, depth)
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return _find(_absolute(module, node), alias.name, depth - 1)
    return None


def _absolute(module: str, node: ast.ImportFrom) -> str:
    """Return the absolute name of the module in `node`, a statement `from ... import ...` that occurs in `module`."""
    if node.level == 0:
        return node.module or ""
    path = source_of(module)
    inside = path is not None and path.name == "__init__.py"
    parts = module.split(".")
    parts = parts[: len(parts) - node.level + inside]
    return ".".join([*parts, *([node.module] if node.module else [])])


def _class(module: str, node: ast.ClassDef, depth: int) -> Parameters | None:
    init = next((part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == "__init__"), None)
    if init is not None and not _accepts_any(init.args):
        return _arguments(init.args, skip=1)
    if init is not None and (not node.bases or module.split(".")[0] != "sslcli"):
        return None  # classes of other packages may read keywords from **kwargs
    found: Parameters = {}
    for base in node.bases:  # the constructor passes **kwargs to its base classes
        inherited = _find(module, base.id, depth - 1) if isinstance(base, ast.Name) else None
        if inherited is None:
            return None
        found |= inherited
    if init is not None:
        passed = _set_keywords(init)
        return {name: found[name] for name in found if name not in passed} | _arguments(init.args, skip=1)
    if any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
        for part in node.body:
            if (
                isinstance(part, ast.AnnAssign)
                and isinstance(part.target, ast.Name)
                and "ClassVar" not in ast.unparse(part.annotation)
            ):
                found[part.target.id] = Parameter(ast.unparse(part.annotation), required=part.value is None)
    return found


def _set_keywords(init: ast.FunctionDef) -> set[str]:
    """Return the keywords that a constructor passes to `super().__init__`."""
    calls = [node for node in ast.walk(init) if isinstance(node, ast.Call)]
    above = [call for call in calls if ast.unparse(call.func) == "super().__init__"]
    return {keyword.arg for call in above for keyword in call.keywords if keyword.arg is not None}


def _accepts_any(arguments: ast.arguments) -> bool:
    """Return True if the arguments include `*args` or `**kwargs`."""
    return arguments.kwarg is not None or arguments.vararg is not None


def _arguments(arguments: ast.arguments, *, skip: int) -> Parameters:
    plain = [*arguments.posonlyargs, *arguments.args][skip:]
    required = len(plain) - len(arguments.defaults)
    found = {}
    for place, argument in enumerate(plain):
        found[argument.arg] = Parameter(_text(argument), required=place < required)
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        found[argument.arg] = Parameter(_text(argument), required=default is None)
    return found


def _text(argument: ast.arg) -> str:
    return "Any" if argument.annotation is None else ast.unparse(argument.annotation)
