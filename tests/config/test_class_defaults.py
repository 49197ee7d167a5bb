"""Keys that an older version did not have."""

from __future__ import annotations

import importlib
import sys
from dataclasses import MISSING
from pathlib import Path
from typing import Any

import pytest
import yaml

from command_line import Cli
from small_runs import FOLDER_LINE, make_folder
from sslcli.config import signatures
from sslcli.config.class_defaults import default_of, resumed_config, section_defaults

PLUG_IN = "from sslcli.methods.simclr import SimCLR\n\nclass Mine(SimCLR):\n"
OLD = "    def __init__(self, **options):\n        super().__init__(**options)\n"
NEW = "    def __init__(self, *, weight: float = 1.0, **options):\n        super().__init__(**options)\n"
NEW += "        assert weight == 1.0, weight\n"


def forget(module: str) -> None:
    """Forget a module, as a new process does."""
    del sys.modules[module]
    importlib.invalidate_caches()
    for cached in (signatures._tree, signatures.parameters_of, signatures.literal_defaults):
        cached.cache_clear()


@pytest.fixture
def target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the dotted name of a class with literal and other defaults."""
    (tmp_path / "defaults_of_mine.py").write_text(
        "SIZE = 3\n\nclass Mine:\n    def __init__(self, a, b=2, *, c=(1, 2), d=SIZE, e=None): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return "defaults_of_mine.Mine"


def test_sections_without_a_class_have_the_defaults_of_their_settings() -> None:
    assert section_defaults("monitor") == {"knn_split": "val", "knn_queries": None}
    assert section_defaults("optimizer") == {}
    affecting = ("init", "init_prefix", "teacher", "teacher_prefix", "teacher_backbone")  # the results
    assert section_defaults("") == dict.fromkeys(affecting)


def test_the_default_of_a_dotted_key_is_that_of_the_class_in_its_section(target: str) -> None:
    flat = {"method._target_": target, "dataset._target_": target}
    assert default_of("method.b", flat) == 2
    assert default_of("monitor.knn_split", flat) == "val"
    for unknown in ("method.a", "method.d", "dataset.b", "seed", "views.b"):
        assert default_of(unknown, flat) is MISSING


@pytest.mark.parametrize(
    ("now", "before", "set_keys", "expected"),
    [
        ({"b": 5}, {}, (), {"b": 2}),
        ({"b": 5}, {}, ("method.b",), {"b": 5}),
        ({"b": 5}, {"b": 4}, (), {"b": 5}),
        ({"d": 5}, {}, (), {"d": 5}),
        ({"b": 5}, {"_target_": "other.Class"}, (), {"b": 5}),
    ],
)
def test_a_key_that_the_stored_configuration_lacks_gets_the_default(
    target: str, now: dict[str, Any], before: dict[str, Any], set_keys: tuple[str, ...], expected: dict[str, Any]
) -> None:
    values = {"seed": 1, "method": {"_target_": target} | now}
    found = resumed_config(values, {"method": {"_target_": target} | before}, set_keys)
    assert found == {"seed": 1, "method": {"_target_": target} | expected}


def test_a_run_keeps_the_value_in_place_of_which_newer_versions_have_auto() -> None:
    values = {"train": {"compile": "auto", "deterministic": "auto", "keep": 3}}
    stored = {"train": {"compile": False, "deterministic": True, "keep": 5}}
    kept = {"train": {"compile": False, "deterministic": True, "keep": 3}}
    assert resumed_config(values, stored, ()) == kept
    assert resumed_config(values, {"train": {}}, ()) == kept
    assert resumed_config(values, stored, ("train.compile",))["train"]["compile"] == "auto"


def test_a_run_resumes_with_the_default_after_its_method_got_a_new_key(cli: Cli, tmp_path: Path) -> None:
    make_folder(tmp_path / "images", broken=0)
    folder = tmp_path / "conf/method"
    folder.mkdir(parents=True)
    node = "defaults: [simclr]\n_target_: key_added_later.Mine\n"
    line = ["--config-dir", "conf", "method=mine", "trust=[key_added_later]", "dataset=folder", "dataset.root=images"]
    line += ["dataset.image_size=16", *FOLDER_LINE, "run_dir=run"]
    (tmp_path / "key_added_later.py").write_text(PLUG_IN + OLD)
    (folder / "mine.yaml").write_text(node)
    assert cli("ssl-train", *line, "train.max_steps=2").code == 0
    forget("key_added_later")
    (tmp_path / "key_added_later.py").write_text(PLUG_IN + NEW)
    (folder / "mine.yaml").write_text(node + "weight: 2.0\n")
    refused = cli("ssl-train", *line, "train.max_steps=3", "method.weight=3")
    assert refused.code == 2
    assert "method.weight: not set -> 3" in refused.err
    ended = cli("ssl-train", *line, "train.max_steps=3")
    assert ended.code == 0, ended.err
    assert "continuing from step 2" in ended.out
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["method"]["weight"] == 1.0
