"""Packages that announce themselves by the entry point `sslcli.plugins`."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from sslcli.config.plugins import plugin_folders, plugins


@pytest.fixture
def announced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Four announcements of three packages: one with yaml files, one without, one that is not installed."""
    values = ["plugin_a_of_test", "plugin_a_of_test.deep:Thing", "plugin_b_of_test:register", "plugin_c_of_test"]
    entries = [EntryPoint(name=str(n), value=value, group="sslcli.plugins") for n, value in enumerate(values)]
    monkeypatch.setattr(
        importlib.metadata, "entry_points", lambda *, group: entries if group == "sslcli.plugins" else []
    )
    for name in ("plugin_a_of_test/conf/method", "plugin_b_of_test"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("plugin_a_of_test", "plugin_b_of_test"):
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    plugins.cache_clear()
    yield tmp_path
    plugins.cache_clear()


def test_each_package_is_named_once_by_its_top_level_name(announced: Path) -> None:
    assert plugins() == ("plugin_a_of_test", "plugin_b_of_test", "plugin_c_of_test")


def test_folders_of_yaml_files_are_found_without_importing_a_package(announced: Path) -> None:
    assert plugin_folders() == {"plugin_a_of_test": announced / "plugin_a_of_test" / "conf"}
    assert not any(name.startswith("plugin_") and name.endswith("_of_test") for name in sys.modules)
