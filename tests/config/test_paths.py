"""Values of a configuration that are paths, and their absolute form."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from sslcli.config.paths import (
    absolute,
    absolute_paths,
    convert_source,
    map_paths,
    numbers_as_text,
    paths_of,
    quote_home_paths,
    real_path,
    results_dir_of,
    same_paths,
    without_paths,
)
from sslcli.errors import ConfigError


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory, with a home beside it."""
    for name in ("here", "home"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def node(target: str, **values: Any) -> dict[str, Any]:
    return {"_target_": f"sslcli.data.{target}", **values}


def test_absolute_forms(here: Path) -> None:
    home = here.parent / "home"
    assert absolute("a/./b/") == f"{here}/a/b"
    assert absolute("../a") == f"{here.parent}/a"
    assert absolute("/a/b") == "/a/b"
    assert absolute("~") == str(home)
    assert absolute("~/a") == f"{home}/a"
    assert absolute("./~/a") == f"{here}/~/a"
    for unchanged in ("", "s3://bucket/a", "simplecache::s3://bucket/a", "hf://datasets/a/b"):
        assert absolute(unchanged) == unchanged
    with pytest.raises(
        ConfigError, match=r"'~nobody-knows/a' begins with '~nobody-knows', .* home directory is unknown"
    ):
        absolute("~nobody-knows/a")


def test_paths_of_weights_may_follow_the_name_of_a_source(here: Path) -> None:
    assert convert_source("net.pt", absolute) == str(here / "net.pt")
    assert convert_source("run:runs/a", absolute) == f"run:{here}/runs/a"
    assert convert_source("timm:hf-hub:a/b", absolute) == "timm:hf-hub:a/b"


def test_a_parent_behind_a_link_is_the_parent_of_where_the_link_leads(here: Path) -> None:
    (here.parent / "far" / "inside").mkdir(parents=True)
    (here.parent / "far" / "data").mkdir()
    (here / "link").symlink_to(here.parent / "far" / "inside")
    assert os.path.samefile(absolute("link/../data"), here.parent / "far" / "data")
    assert real_path("link/../data") == str(here.parent / "far" / "data")
    # A path that does not exist yet is created where the shell would create it, and a later abspath does not change it.
    assert absolute("link/../runs/new") == str(here.parent / "far" / "runs" / "new")
    assert os.path.abspath(absolute("link/../data")) == str(here.parent / "far" / "data")


@pytest.mark.parametrize(
    ("given", "key", "wanted"),
    [
        (node("sources.files.Folder", root="a"), "root", "HERE/a"),
        (node("sources.files.Folder", root="~/a"), "root", "HOME/a"),
        (node("sources.files.Folder", root=["a", "~/b"]), "root", ["HERE/a", "HOME/b"]),
        (node("sources.files.Folder", root={"a": 1.0, "~/b": 2}), "root", {"HERE/a": 1.0, "HOME/b": 2}),
        (node("sources.files.Folder", test="t"), "test", "HERE/t"),
        (node("sources.files.Folder", test=None), "test", None),
        (node("sources.files.Folder", keep_dir="~/k"), "keep_dir", "HOME/k"),
        (node("sources.files.Folder", keep_decoded="disk"), "keep_decoded", "disk"),
        (node("sources.files.Flat", root="a"), "root", "HERE/a"),
        (node("sources.files.ImageNet", root="data/imagenet"), "root", "HERE/data/imagenet"),
        (node("sources.files.ListFile", file="a.csv"), "file", "HERE/a.csv"),
        (node("sources.files.ListFile", root="~"), "root", "HOME"),
        (node("sources.parallel.Parallel", root="a"), "root", "HERE/a"),
        (node("sources.parallel.Parallel", test="a"), "test", "HERE/a"),
        (node("sources.parallel.Parallel", modalities={"rgb": {"interpolation": "smooth"}}), "modalities", None),
        (node("sources.base.TorchvisionSet", root="data", name="CIFAR10"), "root", "HERE/data"),
        (node("sources.base.TorchvisionSet", root="data", name="CIFAR10"), "name", "CIFAR10"),
        (node("sources.hf.Hf", path="uoft-cs/cifar10"), "path", "uoft-cs/cifar10"),
        (node("sources.hf.Hf", path="sets/there"), "path", "HERE/sets/there"),
        (node("sources.hf.Hf", path="~/sets"), "path", "HOME/sets"),
        (node("sources.hf.Hf", path="./sets"), "path", "HERE/sets"),
        (node("sources.hf.Hf", test="test"), "test", "test"),
        (node("sources.hf.Hf", cache="c"), "cache", "HERE/c"),
        (node("shards.source.HfStream", path="a/train-{000..127}.tar"), "path", "HERE/a/train-{000..127}.tar"),
        (node("shards.source.HfStream", path=["~/a-*.tar", "s3://b/c.tar"]), "path", ["HOME/a-*.tar", "s3://b/c.tar"]),
        (node("shards.source.HfStream", test="gs://b/*.tar"), "test", "gs://b/*.tar"),
        (node("shards.source.HfStream", cache="~/c"), "cache", "HOME/c"),
    ],
)
def test_the_paths_of_every_image_set(here: Path, given: dict[str, Any], key: str, wanted: Any) -> None:
    def filled(value: Any) -> Any:
        if isinstance(value, str):
            return value.replace("HERE", str(here)).replace("HOME", str(here.parent / "home"))
        if isinstance(value, dict):
            return {filled(name): inner for name, inner in value.items()}
        return [filled(inner) for inner in value] if isinstance(value, list) else value

    (here / "sets" / "there").mkdir(parents=True)
    found = absolute_paths("eval", {"dataset": given})["dataset"][key]
    assert found == (given["modalities"] if key == "modalities" else filled(wanted))


def test_the_plain_paths_of_every_command(here: Path) -> None:
    home = here.parent / "home"
    assert absolute_paths("train", {"run_dir": "~/r", "name": "a/b"}) == {"run_dir": f"{home}/r", "name": "a/b"}
    assert absolute_paths("train", {"run_dir": None}) == {"run_dir": None}
    assert absolute_paths("eval", {"run": "r", "weights": "~/w"}) == {"run": f"{here}/r", "weights": f"{home}/w"}
    assert absolute_paths("export", {"run": "r", "out": "~/o"}) == {"run": f"{here}/r", "out": f"{home}/o"}


PLUGIN = """
from __future__ import annotations
import os, pathlib
from dataclasses import dataclass
from typing import Any, Optional, Union
from pathlib import Path
from sslcli.data.sources.files import Flat, Folder
from sslcli.data.sources.scan import Root
Places = Union[str, "list[Path]"]

class Mine(Flat):
    def __init__(
        self, *, index: Path | None, more: Places, masks: dict[str, Path], tag: str, **common: Any
    ) -> None: ...

class Plain(Folder): ...

class Narrow(Folder):
    def __init__(self, *, root: str, other: Optional[pathlib.Path] = None, **common: Any) -> None: ...

@dataclass
class Wrapper:
    inner: Any
    place: "os.PathLike[str]"
"""


def test_plug_ins_tell_their_paths_by_their_annotations(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "plugged_paths.py").write_text(PLUGIN)
    monkeypatch.setattr(sys, "path", [*sys.path, str(here)])
    mine = {"_target_": "plugged_paths.Mine", "index": "i", "more": ["m"], "masks": {"a": "p"}, "tag": "t", "root": "r"}
    config = {
        "dataset": {"_target_": "plugged_paths.Wrapper", "place": "p", "inner": mine},
        "other": [{"_target_": "plugged_paths.Narrow", "root": "r", "other": "o", "test": "t"}],
        "plain": {"_target_": "plugged_paths.Plain", "root": ["r"]},
    }
    found = map_paths(config, absolute)
    assert found["dataset"]["place"] == f"{here}/p"
    inner = {"index": f"{here}/i", "more": [f"{here}/m"], "masks": {"a": f"{here}/p"}, "tag": "t", "root": f"{here}/r"}
    assert found["dataset"]["inner"] == mine | inner
    assert found["other"][0] == config["other"][0] | {"root": f"{here}/r", "other": f"{here}/o", "test": f"{here}/t"}
    assert found["plain"]["root"] == [f"{here}/r"]


def test_configurations_are_compared_by_where_paths_lead(here: Path) -> None:
    (here / "a").mkdir()
    (here / "link").symlink_to(here / "a")
    one, other = (
        node("sources.files.Folder", root="a", limit=3),
        node("sources.files.Folder", root=f"{here}/link", limit=3),
    )
    assert same_paths(one, other)
    assert not same_paths(one, other | {"limit": 4})
    assert not same_paths(one, node("sources.files.Folder", root="b", limit=3))
    assert without_paths(one) == without_paths(node("sources.files.Folder", root="b", limit=3))
    assert without_paths(one) != without_paths(other | {"limit": 4})
    assert list(paths_of(node("sources.files.Folder", root={"a": 1.0, "b": 2.0}, test="t"))) == [
        ("root", "a"),
        ("root", "b"),
        ("test", "t"),
    ]


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("run_dir=~/r", 'run_dir="~/r"'),
        ("run_dir=~", 'run_dir="~"'),
        ("dataset.root=[~/a,b, ~me/c]", 'dataset.root=["~/a",b, "~me/c"]'),
        ("dataset.path=~/a-*.tar", 'dataset.path="~/a-*.tar"'),
        ("dataset.root=~/a,~/b", 'dataset.root="~/a","~/b"'),
        ("dataset.root={~/a: 1.0, b: 2}", f"dataset.root={{{Path('~/a').expanduser()}: 1.0, b: 2}}"),
        ("run_dir='~/r x'", "run_dir='~/r x'"),
        ("run_dir=a~b", "run_dir=a~b"),
        ("~method.mixture", "~method.mixture"),
        ("~train.epochs=1", "~train.epochs=1"),
        ("a", "a"),
        ("run_dir=~/my runs/first one", 'run_dir="~/my runs/first one"'),
        ("dataset.root=[~/my photos, ~/b]", 'dataset.root=["~/my photos", "~/b"]'),
        ("dataset.root={photos: ~/my photos, b: c}", 'dataset.root={photos: "~/my photos", b: c}'),
    ],
)
def test_paths_in_the_home_need_no_quotes(line: str, wanted: str) -> None:
    assert quote_home_paths(line) == wanted


def test_numbers_are_text_where_a_path_or_a_name_is_expected() -> None:
    folder = "sources.files.Folder"
    config = {
        "run_dir": 2023,
        "name": 1000.0,
        "seed": 7,
        "dataset": node(folder, root=[2023, "b", {"_target_": "x", "root": 1}], test=7, image_size=32),
    }
    found = numbers_as_text("train", config, ["seed=7", "name=1e3", "dataset.test=007"])
    assert (found["run_dir"], found["name"], found["seed"]) == ("2023", "1e3", 7)
    assert found["dataset"] == node(folder, root=["2023", "b", {"_target_": "x", "root": 1}], test="007", image_size=32)
    for given, expected in (
        ({2023: 1.5, "b": 2}, {"2023": 1.5, "b": 2}),
        ({"first": [2023]}, {"first": ["2023"]}),
        (True, True),
        (None, None),
    ):
        assert numbers_as_text("train", {"dataset": node(folder, root=given)})["dataset"]["root"] == expected
    assert numbers_as_text("eval", {"run": 2023, "weights": None}) == {"run": "2023", "weights": None}
    assert numbers_as_text("export", {"out": 2023}) == {"out": "2023"}


def test_results_are_written_beside_a_file_and_in_the_working_directory_for_timm() -> None:
    assert results_dir_of("/a/net.pt") == Path("/a/net.pt.eval")
    assert results_dir_of("timm:hf-hub:a/b.c") == Path("timm_hf-hub_a_b.c.eval")
