"""Keys that were added to datasets: runs of older versions keep the values that describe what they did."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import yaml

from command_line import Cli
from small_runs import FOLDER_LINE, make_folder
from sslcli.cli import compose
from sslcli.config.added import CLASSES, KEYS, OLD_EXTENSIONS, resumed_dataset, with_added_keys, without_added_keys
from sslcli.config.signatures import parameters_of
from sslcli.data.sources import files
from sslcli.data.sources.scan import FileSearch

FOLDER = "sslcli.data.sources.files.Folder"
CONF = Path(__file__).parents[2] / "conf" / "dataset"
LINE = ["dataset.root=images", "dataset.image_size=16", *FOLDER_LINE]
MINE = "from sslcli.data.sources.files import Folder\nclass Mine(Folder): ...\n"


@contextmanager
def as_before() -> Iterator[None]:
    """Let datasets list the files that version 0.2 listed, and add no keys to configurations."""
    search = partial(FileSearch, extensions=frozenset(OLD_EXTENSIONS), linked_folders="always")
    with (
        patch.object(files, "FileSearch", lambda root, *_: search(root)),
        patch.object(compose, "with_defaults", lambda dataset: dataset),
    ):
        yield


def stored(run_dir: Path) -> dict[str, Any]:
    found = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found["dataset"]  # type: ignore[no-any-return]


def test_every_class_accepts_its_keys_and_has_their_defaults_in_its_yaml_file() -> None:
    files = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in CONF.glob("*.yaml")]
    for target, keys in CLASSES.items():
        module, _, name = target.rpartition(".")
        assert hasattr(importlib.import_module(module), name)
        nodes = [node for node in files if node.get("_target_") == target]
        assert nodes
        for key in keys:
            assert key in (parameters_of(target) or {}), (target, key)
            assert all(node[key] == KEYS[key].default for node in nodes), (target, key)
    assert {key for keys in CLASSES.values() for key in keys} == set(KEYS)


def test_missing_keys_get_their_old_values_and_present_keys_are_kept() -> None:
    assert with_added_keys({"_target_": FOLDER})["extensions"] == list(OLD_EXTENSIONS)
    for value in (None, ["png"]):
        assert with_added_keys({"_target_": FOLDER, "extensions": value})["extensions"] == value
    assert with_added_keys({"_target_": "mine.Other"}) == {"_target_": "mine.Other"}
    assert with_added_keys({"_target_": "mine.Other"}, {"extensions": None})["extensions"] == list(OLD_EXTENSIONS)
    assert with_added_keys({"_target_": FOLDER}, {"_target_": FOLDER}) == {"_target_": FOLDER}
    assert with_added_keys(None) is None


@pytest.mark.parametrize(
    ("now", "before", "set_keys", "expected"),
    [
        ({"extensions": None}, {}, (), list(OLD_EXTENSIONS)),
        ({}, {}, (), list(OLD_EXTENSIONS)),  # a yaml file of the user that lacks the key
        ({"extensions": ["png"]}, {}, (), ["png"]),
        ({"extensions": None}, {}, ("dataset.extensions",), None),
        ({"extensions": None}, {"extensions": None}, (), None),
        ({"extensions": None}, {"extensions": list(OLD_EXTENSIONS)}, (), list(OLD_EXTENSIONS)),  # resumed once
        ({"extensions": None}, {"extensions": ["png"]}, (), None),
    ],
)
def test_a_run_that_lacks_a_key_resumes_with_its_old_value(
    now: dict[str, Any], before: dict[str, Any], set_keys: tuple[str, ...], expected: Any
) -> None:
    target = {"_target_": FOLDER, "root": "x"}
    found = resumed_dataset(target | now, target | before, set_keys)
    old = {"linked_folders": "always", "channels": 3, "value_range": "full", "pretrain_on_val": False}
    assert found == target | old | {"extensions": expected}
    assert resumed_dataset(target | now, None, set_keys) == target | now


@pytest.fixture
def line(cli: Cli, tmp_path: Path) -> Callable[[str], list[str]]:
    """Return the command line of a dataset. `old` is `folder`, and `old_mine` is `mine`, as version 0.2 had them."""
    make_folder(tmp_path / "images", broken=0)
    (tmp_path / "images/a/link").symlink_to("../b")  # version 0.2 listed these images twice
    (tmp_path / "mine.py").write_text(MINE)
    folder = tmp_path / "conf/dataset"
    folder.mkdir(parents=True)
    node = yaml.safe_load((CONF / "folder.yaml").read_text(encoding="utf-8"))
    for key in CLASSES[FOLDER]:
        del node[key]
    (folder / "old.yaml").write_text(yaml.safe_dump(node))
    (folder / "old_mine.yaml").write_text(yaml.safe_dump(node | {"_target_": "mine.Mine"}))
    (folder / "mine.yaml").write_text("defaults: [folder]\n_target_: mine.Mine\n")
    return lambda dataset: ["--config-dir", "conf", f"dataset={dataset}", "trust=[mine]", *LINE]


@pytest.mark.parametrize(("old", "new"), [("old", "folder"), ("old_mine", "mine")])
def test_an_old_run_resumes_with_the_images_it_had(
    cli: Cli, line: Callable[[str], list[str]], tmp_path: Path, old: str, new: str
) -> None:
    with as_before():
        code, _, err = cli("ssl-train", *line(old), "train.max_steps=2")
    assert code == 0, err
    assert "extensions" not in stored(tmp_path / "run")
    shutil.copy("images/a/000.png", "images/a/000.avif")  # files that version 0.2 ignored
    shutil.copy("images/a/000.png", "images/a/IMG_1")
    code, _, err = cli("ssl-train", *line(new), "dataset.extensions=null", "train.max_steps=3")
    assert code == 2
    assert "dataset.extensions: ['bmp', 'gif'" in err
    code, out, err = cli("ssl-train", *line(new), "train.max_steps=3")
    assert code == 0, err
    assert "continuing from step 2" in out
    assert stored(tmp_path / "run")["extensions"] == list(OLD_EXTENSIONS)
    assert stored(tmp_path / "run")["linked_folders"] == "always"
    code, out, err = cli("ssl-train", *line(new), "train.max_steps=3")
    assert "finished already" in out, err


def test_a_new_run_with_a_yaml_file_that_lacks_the_keys_is_not_taken_for_an_old_run(
    cli: Cli, line: Callable[[str], list[str]], tmp_path: Path
) -> None:
    shutil.copy("images/a/000.png", "images/a/000.avif")
    for steps in (2, 3):
        code, _, err = cli("ssl-train", *line("old"), f"train.max_steps={steps}")
        assert code == 0, err
        found = stored(tmp_path / "run")
        assert {key: found[key] for key in CLASSES[FOLDER]} == {key: KEYS[key].default for key in CLASSES[FOLDER]}
    assert cli("ssl-eval", "run=run", "protocol=knn", "baselines=false", "device=cpu").code == 0
    own = ["run=run", "protocol=knn", "baselines=false", "device=cpu", "dataset=old", "dataset.root=images"]
    assert cli("ssl-eval", "--config-dir", "conf", *own, "dataset.image_size=16").code == 0
    assert [path.name for path in Path("run/eval").glob("knn*.json")] == ["knn.json"]  # the same images


def test_an_old_run_is_evaluated_on_the_images_it_had(cli: Cli, line: Callable[[str], list[str]]) -> None:
    with as_before():
        code, _, err = cli("ssl-train", *line("old"), "train.max_steps=1")
    assert code == 0, err
    shutil.copy("images/a/000.png", "images/a/000.avif")
    knn = ["run=run", "protocol=knn", "baselines=false", "device=cpu"]
    code, _, err = cli("ssl-eval", *knn)
    assert code == 0, err
    assert [path.name for path in Path("run/eval").glob("knn*.json")] == ["knn.json"]  # the name for the run's images
    code, _, err = cli("ssl-eval", *knn, "dataset.extensions=null")
    assert code == 0, err
    assert len(list(Path("run/eval").glob("knn*.json"))) == 2


def test_keys_that_an_older_file_lacks_are_not_compared() -> None:
    now = {"root": "x", "value_range": "auto", "channels": 3, "extensions": ["png"]}
    assert without_added_keys(now, {"root": "x"}) == {"root": "x", "extensions": ["png"]}
    assert without_added_keys(now, {"channels": 3}) == {"root": "x", "channels": 3, "extensions": ["png"]}
