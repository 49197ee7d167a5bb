"""Imports follow the order of the packages, there are no import cycles, and every module has a test file."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "sslcli"
# A module imports only from its own package and from packages further up this list.
ORDER = (
    "errors",
    "config",
    "system",
    "kernels",
    "report",
    "distributed",
    "nn",
    "backbones",
    "weights",
    "methods",
    "data",
    "engine",
    "evaluation",
    "runs",
    "sweeps",
    "cli",
    "api",
)
KNOW_HYDRA = ("api", "cli")
KNOW_OMEGACONF = ("cli", "config")
IMPORTS_BY_NAME = ("sslcli.runs.build", "sslcli.config.moved")
FORBIDDEN_NAMES = ("util", "utils", "helper", "helpers", "common", "manager", "misc")
# Modules without a test file of their name, and the file with their tests. `__init__` modules are exempt: they only
# export names.
TESTED_ELSEWHERE = {
    "data/sources/picture.py": "tests/data/test_decode.py",  # declares interfaces; the decoder implements them
}
# Test files of packages that cover several modules or the yaml files.
OTHER_TESTS = {
    "backbones/test_backbone_conf.py",  # the yaml files of conf/backbone
    "cli/test_conf.py",  # all yaml files
    "cli/test_parallel_command.py",  # a command on several processes
    "cli/test_working_directory.py",  # all commands from other working directories
    "sweeps/test_sweep_others.py",  # sweeps and jobs of other processes
}
FILES = sorted(PACKAGE.rglob("*.py"))
SCRIPTS = sorted((ROOT / "scripts").rglob("*.py"))


def package_of(module: str) -> str:
    """`sslcli.data.views.spec` -> `data`; the package itself is `sslcli`."""
    return module.split(".")[1] if "." in module else "sslcli"


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {module_of(path): path for path in FILES}


def imports(source: str, module: str, known: Mapping[str, Path] = MODULES) -> Iterator[str]:
    """Every module that the source imports, at its top or in a function, with its full name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import: write the whole name"
            name = node.module or ""
            full = [f"{name}.{alias.name}" for alias in node.names]
            yield from (each if each in known or name == "sslcli" else name for each in full)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            assert module in IMPORTS_BY_NAME or not module.startswith("sslcli"), f"{module} imports by name"


def faults(source: str, module: str) -> list[str]:
    """The imports of a module that the order of the packages forbids."""
    own, found = package_of(module), []
    for name in imports(source, module):
        top, package = name.split(".")[0], package_of(name)
        if (top == "hydra" and own not in KNOW_HYDRA) or (top == "omegaconf" and own not in KNOW_OMEGACONF):
            found.append(f"{module} imports {name}")
        if top in ("tests", "scripts", "conf"):
            found.append(f"{module} imports {name}, which no module imports")
        if top != "sslcli" or package in (own, "sslcli", "__version__"):
            continue
        if own != "sslcli" and ORDER.index(package) >= ORDER.index(own):
            found.append(f"{module} imports {name}, but {package} comes after {own}")
    return found


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of modules that reach each other, by repeatedly removing modules without arrows in or out."""
    left = {module: set(targets) for module, targets in graph.items()}
    while True:
        pointed_at = {target for targets in left.values() for target in targets}
        ends = {module for module in left if not (left[module] & set(left)) or module not in pointed_at}
        if not ends:
            return [sorted(left)] if left else []
        left = {module: targets - ends for module, targets in left.items() if module not in ends}


@pytest.mark.parametrize("path", FILES, ids=lambda path: module_of(path))
def test_imports_go_one_way(path: Path) -> None:
    assert faults(path.read_text("utf-8"), module_of(path)) == []


def test_no_modules_import_each_other() -> None:
    graph = {module: set(imports(path.read_text("utf-8"), module)) & set(MODULES) for module, path in MODULES.items()}
    assert circles(graph) == []
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]


def test_no_scripts_import_each_other() -> None:
    names = {path.stem: path for path in SCRIPTS}
    graph = {name: set(imports(path.read_text("utf-8"), name, names)) & set(names) for name, path in names.items()}
    assert graph["run"], "the imports between scripts are not seen"
    assert circles(graph) == []


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_scripts_import_only_modules_that_exist(path: Path) -> None:
    found = [name for name in imports(path.read_text("utf-8"), path.stem) if name.split(".")[0] == "sslcli"]
    assert [name for name in found if name not in MODULES and name != "sslcli.__version__"] == []


def test_the_root_holds_errors_only_and_every_package_has_its_place() -> None:
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", "errors.py"}
    assert {package_of(module) for module in MODULES} - {"sslcli"} == set(ORDER)


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("sslcli.methods.moco", "from sslcli.data.views import spec"),
        ("sslcli.methods.moco", "from sslcli.engine.loop import Run"),
        ("sslcli.backbones.small", "import sslcli.methods.moco"),
        ("sslcli.methods.moco", "def f():\n    from sslcli import data"),
        ("sslcli.data.loader", "from hydra import compose"),
        ("sslcli.config.schema", "from hydra import compose"),
        ("sslcli.runs.directory", "from omegaconf import OmegaConf"),
        ("sslcli.report.metrics", "from sslcli.engine import checkpoint"),
        ("sslcli.engine.stop", "from sslcli.runs.worker import run"),
        ("sslcli.evaluation.knn", "from sslcli.cli import compose"),
        ("sslcli.distributed.collectives", "from sslcli.nn.heads import mlp"),
    ],
)
def test_an_import_the_wrong_way_is_seen(module: str, line: str) -> None:
    assert len(faults(line, module)) == 1


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("sslcli.methods.byol", "from sslcli.nn.schedule import ema_momentum"),
        ("sslcli.data.loader", "from sslcli.methods.base import Batch"),
        ("sslcli.report.metrics", "from sslcli.system.atomic import replace"),
        ("sslcli.engine.loop", "from sslcli.engine import checkpoint\nfrom sslcli.errors import ConfigError"),
        ("sslcli.cli.train", "from sslcli import __version__\nimport hydra\nimport torch"),
    ],
)
def test_an_import_the_right_way_is_let_through(module: str, line: str) -> None:
    assert faults(line, module) == []


def expected_test_file(path: Path) -> Path:
    """`sslcli/nn/ema.py` -> `tests/nn/test_ema.py`."""
    inside = path.relative_to(PACKAGE)
    return ROOT / "tests" / inside.parent / f"test_{inside.name}"


def test_every_module_has_a_test_file_of_its_name() -> None:
    named = [path for path in FILES if path.name != "__init__.py"]
    without = {str(path.relative_to(PACKAGE)) for path in named if not expected_test_file(path).exists()}
    assert without == set(TESTED_ELSEWHERE)
    assert all((ROOT / place).exists() for place in TESTED_ELSEWHERE.values())


def test_every_test_file_of_a_package_is_named_after_a_module_or_a_purpose() -> None:
    packages = {ROOT / "tests" / name for name in ORDER if name != "errors"}
    modules = {expected_test_file(path) for path in FILES}
    files = {path for folder in packages for path in folder.rglob("test_*.py")}
    assert {str(path.relative_to(ROOT / "tests")) for path in files - modules} == OTHER_TESTS


def test_no_module_is_named_after_nothing() -> None:
    names = [part for path in FILES for part in path.relative_to(PACKAGE).with_suffix("").parts]
    assert [name for name in names if set(name.lower().split("_")) & set(FORBIDDEN_NAMES)] == []
