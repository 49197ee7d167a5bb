from __future__ import annotations

import importlib
import inspect
import sys
from pathlib import Path

import pytest
import torch
import yaml

from sslcli.config.signatures import literal_defaults, parameters_of, source_of

CONF = Path(__file__).parents[2] / "conf"
TARGETS = sorted(
    {
        node["_target_"]
        for path in CONF.rglob("*.yaml")
        for part in [yaml.safe_load(path.read_text())]
        for node in [part, *(value for value in part.values() if isinstance(value, dict))]
        if "_target_" in node
    }
)

FIXED = {"sslcli.data.sources.files.ImageNet": {"test"}}  # keywords of a base that a class gives itself


def keywords(kind: type) -> dict[str, bool]:
    """Return name and requiredness of each keyword of a class, from `inspect`, with `**common` resolved."""
    found: dict[str, bool] = {}
    for base in reversed(kind.__mro__[:-1]):
        if "__init__" not in vars(base):
            continue
        own = list(inspect.signature(base.__init__).parameters.values())[1:]
        plain = {p.name: p.default is p.empty for p in own if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
        found = (found if any(p.kind is p.VAR_KEYWORD for p in own) else {}) | plain
    return found


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_read_from_the_source_is_what_python_sees(target: str) -> None:
    module, _, name = target.rpartition(".")
    kind = getattr(importlib.import_module(module), name)
    read = parameters_of(target)
    assert read is not None
    seen = {name: required for name, required in keywords(kind).items() if name not in FIXED.get(target, ())}
    assert {name: parameter.required for name, parameter in read.items()} == seen


@pytest.mark.parametrize("name", ["SGD", "AdamW", "Adam", "RMSprop", "NAdam", "Adagrad"])
def test_optimizers_of_torch_are_read_without_importing_them(name: str) -> None:
    read = parameters_of(f"torch.optim.{name}")
    assert read is not None
    assert list(read) == list(inspect.signature(getattr(torch.optim, name)).parameters)


OWN = """
from dataclasses import dataclass
from torch import nn
from .other import Other as Renamed

class Plain(nn.Module):
    def __init__(self, width: int, *, depth=3): ...

class Open(nn.Module):
    def __init__(self, width: int, **rest): ...

class Bare(nn.Module): ...

@dataclass
class Data:
    size: int
    name: str = "x"

def make(width: int, depth: int = 2): ...

@wrapped
def decorated(width: int): ...
"""


def test_a_package_of_the_users_own_is_read_where_that_is_safe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "mynets_of_test"
    package.mkdir()
    (package / "__init__.py").write_text(OWN)
    (package / "other.py").write_text("def Other(a, b=1): ...\nraise RuntimeError('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))

    def names(target: str) -> list[str] | None:
        read = parameters_of(f"mynets_of_test.{target}")
        return None if read is None else list(read)

    assert names("Plain") == ["width", "depth"]
    assert names("Renamed") == ["a", "b"]
    assert names("make") == ["width", "depth"]
    assert names("Data") == ["size", "name"]
    assert [names(name) for name in ("Open", "Bare", "decorated", "nonesuch")] == [None] * 4
    assert "mynets_of_test" not in sys.modules


@pytest.mark.parametrize("module", ["", "nonesuch_package", "sslcli.nonesuch", "math", "json.decoder.nonesuch"])
def test_a_module_without_python_source_is_not_read(module: str) -> None:
    assert source_of(module) is None
    assert parameters_of(f"{module}.Thing") is None


def test_source_that_is_no_python_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_of_test.py").write_text("def (:\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert parameters_of("broken_of_test.Thing") is None


def test_literal_defaults_are_those_of_the_class_and_its_bases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "defaults_of_test.py").write_text(
        "from dataclasses import dataclass\n"
        "from sslcli.evaluation.knn import Knn\n"
        "SIZE = 3\n"
        "class Base:\n    def __init__(self, a, b=2, *, c=(1, 2), d=SIZE, e=None): ...\n"
        "class Mine(Base):\n    def __init__(self, b=SIZE, *, f=0.5, **options): ...\n"
        "@dataclass\nclass Data(Knn):\n    size: int = 7\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert literal_defaults("defaults_of_test.Base") == {"b": 2, "c": (1, 2), "e": None}
    assert literal_defaults("defaults_of_test.Mine") == {"c": (1, 2), "e": None, "f": 0.5}
    assert literal_defaults("defaults_of_test.Data")["size"] == 7
    assert literal_defaults("defaults_of_test.Data")["resamples"] == 1000
    assert literal_defaults("defaults_of_test.Nonesuch") == {}
    assert "defaults_of_test" not in sys.modules
