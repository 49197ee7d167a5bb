"""The image set of a run with the overrides of an evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sslcli.config.own_dataset import (
    READING,
    Change,
    dataset_of_run,
    has_same_keys,
    has_same_paths,
    image_settings,
    missing_path_hint,
)
from sslcli.errors import ConfigError


@pytest.fixture
def saved() -> dict[str, Any]:
    return {
        "dataset": {
            "_target_": "sslcli.data.sources.files.Folder",
            "root": "/images",
            "test": None,
            "limit": None,
            "workers": 2,
            "image_size": 32,
        }
    }


def test_without_changes_it_is_that_of_the_run_with_absolute_paths(
    saved: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    saved["dataset"]["root"] = "images"
    assert dataset_of_run(saved, [], trust=[]) == saved["dataset"] | {"root": f"{tmp_path}/images"}
    assert saved["dataset"]["root"] == "images"


def test_changes_set_add_and_delete(saved: dict[str, Any]) -> None:
    changes = [Change("", "limit", 5), Change("+", "root", {"/a": 1.0, "/b": 2.0}), Change("~", "root./b", None)]
    found = dataset_of_run(saved, changes[:2], trust=[])
    assert (found["limit"], found["root"]) == (5, {"/a": 1.0, "/b": 2.0})
    found = dataset_of_run(saved, [Change("", "root", {"a": 1.0, "b": 2.0}), Change("~", "root.b", None)], trust=[])
    assert [Path(name).name for name in found["root"]] == ["a"]
    assert saved["dataset"]["limit"] is None


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (Change("", "roott", "/x"), ["dataset.roott", "Did you mean 'root'?"]),
        (Change("+", "roott", "/x"), ["dataset.roott", "Did you mean 'root'?"]),
        (Change("", "limit", "all"), ["dataset.limit is 'all'"]),
        (Change("", "_target_", "os.system"), ["dataset._target_ is 'os.system'", "trust"]),
        (Change("~", "root", None), ["~dataset.root", "cannot be deleted"]),
        (Change("~", "root.x", None), ["~dataset.root.x", "cannot be deleted"]),
    ],
)
def test_an_invalid_change_is_refused_by_the_name_of_its_key(
    change: Change, expected: list[str], saved: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError) as error:
        dataset_of_run(saved, [change], trust=[])
    assert [part for part in expected if part not in str(error.value)] == [], error.value


def test_only_settings_that_choose_images_make_another_set(saved: dict[str, Any]) -> None:
    one = saved["dataset"]
    assert has_same_keys(one, one | {"workers": 9, "max_bad": 0.5, "keep_dir": "/cache"})
    assert has_same_keys(one, one | {"root": "/elsewhere"})
    assert not has_same_keys(one, one | {"limit": 5})
    assert not has_same_keys(one, one | {"image_size": 64})
    assert has_same_keys(one, one | {"extensions": ["png"]})  # the same images, if the fingerprints are equal
    assert not has_same_paths(one, one | {"extensions": ["png"]})
    assert not set(image_settings(one | dict.fromkeys(READING, 1))) & set(READING)


def test_the_place_of_the_images_counts_where_it_is_asked_for(saved: dict[str, Any]) -> None:
    one = saved["dataset"]
    assert has_same_paths(one, one | {"workers": 9})
    assert has_same_paths(one, one | {"root": "/images/../images"})
    assert not has_same_paths(one, one | {"root": "/elsewhere"})


def test_a_path_that_does_not_exist_is_named(saved: dict[str, Any], tmp_path: Path) -> None:
    node = saved["dataset"] | {"root": str(tmp_path)}
    assert missing_path_hint(node) == ""
    hint = missing_path_hint(node | {"root": str(tmp_path / "gone")})
    assert f"{tmp_path}/gone" in hint
    assert "add dataset.root=FOLDER" in hint
    assert missing_path_hint(node | {"root": "s3://bucket/gone"}) == ""
