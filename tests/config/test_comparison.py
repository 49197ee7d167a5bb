"""Comparison of stored and current configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sslcli.config.comparison import changed_settings, digest_of_settings, flatten, relative_path_keys

CONFIG: dict[str, Any] = {
    "seed": 0,
    "run_dir": "out",
    "launcher": {"threads": 2},
    "method": {"_target_": "sslcli.methods.byol.BYOL", "momentum": 0.99},
    "dataset": {"_target_": "sslcli.data.sources.files.Folder", "root": "images", "workers": 2},
    "train": {"epochs": 10, "max_time": None},
}


def test_keys_are_dotted_without_what_changes_nothing() -> None:
    assert flatten(CONFIG | {"effective": {"steps": 3}, "device": "cpu", "_lines_": []}) == {
        "seed": 0,
        "method._target_": "sslcli.methods.byol.BYOL",
        "method.momentum": 0.99,
        "dataset._target_": "sslcli.data.sources.files.Folder",
        "dataset.root": "images",
        "train.epochs": 10,
    }


def test_a_key_or_a_section_may_differ() -> None:
    now = CONFIG | {"seed": 1, "train": {"epochs": 20, "max_time": "5m"}}
    assert changed_settings(CONFIG, now) == ["seed: 0 -> 1", "train.epochs: 10 -> 20"]
    assert changed_settings(CONFIG, now, may_differ=["train.epochs"]) == ["seed: 0 -> 1"]
    assert changed_settings(CONFIG, now, may_differ=["train", "seed"]) == []


def test_old_names_and_other_forms_of_a_path_are_the_same_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    dataset = {"_target_": "sslcli.data.sources.files.Folder", "root": str(tmp_path / "images")}
    old = {"train": {"log_every": 5}, "dataset": dataset | {"_target_": "sslcli.data.files.Folder", "root": "./images"}}
    assert changed_settings(old, {"train": {"log_every_steps": 5}, "dataset": dataset}) == []


def test_a_missing_key_is_the_default_of_the_class() -> None:
    method = {"_target_": "sslcli.methods.byol.BYOL", "momentum": 0.996}  # BYOL's default
    without, other = CONFIG | {"method": {"_target_": method["_target_"]}}, CONFIG | {"method": method | {"dim": 7}}
    assert changed_settings(without, CONFIG | {"method": method}) == []
    assert changed_settings(CONFIG | {"method": method}, without) == []
    assert changed_settings(without, other) == ["method.dim: not set -> 7"]
    assert digest_of_settings(without) == digest_of_settings(CONFIG | {"method": method})
    assert digest_of_settings(without) != digest_of_settings(other)


def test_initial_weights_are_the_same_from_another_form_of_their_path(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "run")
    one, other = (CONFIG | {"init": f"run:{tmp_path}/{name}"} for name in ("run", "link"))
    assert changed_settings(one, other) == []
    assert digest_of_settings(one) == digest_of_settings(other) != digest_of_settings(CONFIG)
    assert changed_settings(CONFIG, CONFIG | {"init": None}) == []
    assert changed_settings(CONFIG, CONFIG | {"init": "timm:a"}) == ["init: not set -> timm:a"]


def test_auto_is_the_default_of_older_versions() -> None:
    auto, old, other = (
        CONFIG | {"train": {"epochs": 10, "compile": compiled, "deterministic": deterministic}}
        for compiled, deterministic in (("auto", "auto"), (False, True), (True, False))
    )
    for stored in (CONFIG, old, auto):
        assert changed_settings(stored, auto) == []
        assert digest_of_settings(stored) == digest_of_settings(auto)
    assert changed_settings(auto, other) == ["train.compile: auto -> True", "train.deterministic: auto -> False"]
    assert digest_of_settings(auto) != digest_of_settings(other)


def test_the_digest_differs_exactly_if_settings_that_affect_the_results_differ() -> None:
    train = {"epochs": 10.0, "max_time": "5m", "extend": "decay", "clip_grad": None}
    same = CONFIG | {"run_dir": "other", "launcher": {"threads": 4}, "train": train, "_lines_": ["x"]}
    assert digest_of_settings(same) == digest_of_settings(CONFIG)
    for other in ({"seed": 1}, {"seed": "0"}, {"train": {"epochs": 11}}, {"train": {"epochs": 10, "clip_grad": 1}}):
        assert digest_of_settings(CONFIG | other) != digest_of_settings(CONFIG)


def test_only_relative_paths_of_the_dataset_are_listed() -> None:
    assert relative_path_keys(CONFIG) == ("dataset.root",)
    for root in ("/images", "s3://bucket/images"):
        assert relative_path_keys(CONFIG | {"dataset": CONFIG["dataset"] | {"root": root}}) == ()
    assert relative_path_keys({}) == ()
