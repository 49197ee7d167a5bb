"""Imports go one way, as the table of ranks says; a new module needs a line in it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "sslcli"

# A part may import parts of a lower rank. A package counts as one part; `cli` may import all.
RANKS = {
    "errors": 0,
    "atomic": 0,
    "regular_files": 0,
    "settings": 1,
    "schedule": 1,  # pure functions of progress
    "heartbeat": 1,
    "distributed": 2,
    "slurm": 2,
    "nn": 3,
    "decoder": 3,
    "noise": 3,
    "mixture": 3,
    "losses": 3,
    "methods": 4,
    "backbones": 4,
    "migrations": 4,
    "pieces": 4,
    "winograd_passes": 2,
    "winograd_transforms": 3,
    "winograd": 4,
    "sharding": 5,
    "checkpoint": 5,
    "data": 5,
    "optim": 5,
    "health": 5,
    "report": 5,
    "precision": 5,
    "allocator": 0,
    "idle_threads": 0,
    "cores": 0,
    "interpreter": 0,
    "checkpoint_names": 0,
    "compiled": 0,
    "cached_gradients": 6,
    "launch": 6,
    "train": 6,
    "evaluate": 6,
    "stopping": 6,
    "watch": 6,
    "cli": 7,
}
SIDEWAYS = {  # within one rank, in this direction alone
    ("atomic", "regular_files"),
    ("mixture", "noise"),  # its random numbers
    ("decoder", "nn"),
    ("train", "cached_gradients"),
    ("train", "stopping"),
    ("train", "watch"),
}
FORBIDDEN_NAMES = ("util", "utils", "helper", "helpers", "common", "manager", "misc")
FILES = sorted(path for path in PACKAGE.rglob("*.py"))


def part_of(module: str) -> str:
    """`sslcli.data.views.views` -> `data`; the package itself is `sslcli`."""
    return module.split(".")[1] if "." in module else "sslcli"


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imports(source: str, module: str) -> Iterator[str]:
    """Every module that the source imports, at its top or in a function, with its full name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import: write sslcli. in front"
            name = node.module or ""
            yield from (f"{name}.{alias.name}" if name == "sslcli" else name for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            assert module in ("sslcli.runs.build",), f"{module} imports by name, which only building may"


def faults(source: str, module: str) -> list[str]:
    """What the imports of a module do against the table."""
    own, found = part_of(module), []
    for name in imports(source, module):
        top, part = name.split(".")[0], part_of(name)
        if top in ("hydra", "omegaconf") and own != "cli":
            found.append(f"{module} imports {name}: only sslcli.cli knows Hydra")
        if top in ("tests", "scripts", "conf"):
            found.append(f"{module} imports {name}: nothing imports that")
        if top != "sslcli" or part in (own, "sslcli", "__version__"):
            continue
        if RANKS[part] >= RANKS[own] and (own, part) not in SIDEWAYS:
            found.append(f"{module} imports {name}: {own} (rank {RANKS[own]}) may not use {part} (rank {RANKS[part]})")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: module_of(path))
def test_imports_go_one_way(path: Path) -> None:
    assert faults(path.read_text("utf-8"), module_of(path)) == []


def test_every_part_has_a_rank_and_every_rank_a_part() -> None:
    assert {part_of(module_of(path)) for path in FILES} - {"sslcli"} == set(RANKS)


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("sslcli.methods.moco", "from sslcli.data.views.views import Views"),
        ("sslcli.methods.moco", "from sslcli.engine.loop import Run"),
        ("sslcli.methods.moco", "import sslcli.backbones.small"),
        ("sslcli.methods.moco", "def f():\n    from sslcli import data"),
        ("sslcli.data.loader", "from hydra import compose"),
        ("sslcli.engine.monitor", "from omegaconf import OmegaConf"),
        ("sslcli.engine.checkpoint", "from sslcli.report.metrics import read"),
        ("sslcli.engine.stop", "from sslcli.engine.loop import Run"),
        ("sslcli.evaluation.knn", "from sslcli.cli import _build"),
        ("sslcli.nn.modules", "from sslcli.nn.contrastive import info_nce"),
        ("sslcli.distributed.collectives", "from sslcli.nn.modules import mlp"),
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
        ("sslcli.engine.loop", "from sslcli import checkpoint, distributed\nfrom sslcli.errors import ConfigError"),
        ("sslcli.cli.train", "from sslcli import __version__\nimport hydra\nimport torch"),
    ],
)
def test_an_import_the_right_way_is_let_through(module: str, line: str) -> None:
    assert faults(line, module) == []


def test_no_module_is_named_after_nothing() -> None:
    names = [part for path in FILES for part in path.relative_to(PACKAGE).with_suffix("").parts]
    assert [name for name in names if set(name.lower().split("_")) & set(FORBIDDEN_NAMES)] == []
