"""A run whose images were moved resumes with the new path, and only with the same images."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from command_line import Cli, Ended
from small_runs import FOLDER_LINE, make_folder, metrics
from sslcli.runs import directory
from sslcli.runs.moved_images import earlier_moved, possibly_moved

LINE = ["dataset=folder", "dataset.image_size=32", *FOLDER_LINE]


@pytest.fixture
def start(cli: Cli, tmp_path: Path) -> Callable[..., Ended]:
    """Start or resume a run on the images below a root."""
    make_folder(tmp_path / "images", broken=0)

    def train(root: str, *more: str, steps: int) -> Ended:
        return cli("ssl-train", *LINE, f"dataset.root={root}", f"train.max_steps={steps}", *more)

    assert train("images", steps=2).code == 0
    return train


def test_a_run_resumes_where_its_images_are_now(start: Callable[..., Ended], cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "images").rename(tmp_path / "new")
    assert start("new", "dry_run=true", steps=4).code == 0
    ended = start("new", steps=4)
    assert (ended.code, ended.err) == (0, "")
    assert f"the images were moved: dataset.root: {tmp_path}/images -> {tmp_path}/new" in ended.out
    stored = directory.read_config(tmp_path / "run")
    assert stored["dataset"]["root"] == str(tmp_path / "new")
    assert earlier_moved(stored) == ("dataset.root",)
    assert possibly_moved(stored, stored) == ()
    # Checkpoints with the first root are still those of the run.
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000004.pt", ignore_errors=True)
    for path in (tmp_path / "run/checkpoints").glob("*4.pt"):
        path.unlink()
    (tmp_path / "run/done").unlink()
    ended = start("new", steps=4)
    assert (ended.code, "the images were moved" in ended.out) == (0, False)
    (tmp_path / "new").rename(tmp_path / "third")
    assert start("third", steps=5).code == 0
    assert [line["step"] for line in metrics(tmp_path / "run")][-1] == 5
    assert cli("ssl-eval", "run=run", "protocol=knn", "baselines=false").code == 0


def test_other_images_at_another_path_are_refused(start: Callable[..., Ended], tmp_path: Path) -> None:
    before = (tmp_path / "run/config.yaml").read_bytes()
    make_folder(tmp_path / "other", per_class=20, broken=0)
    shutil.copytree(tmp_path / "images", tmp_path / "edited")
    path = tmp_path / "edited/a/000.png"
    path.write_bytes(path.read_bytes() + b"x")
    shutil.copytree(tmp_path / "images", tmp_path / "renamed")
    (tmp_path / "renamed/a/000.png").rename(tmp_path / "renamed/a/x.png")
    for root in ("other", "edited", "renamed"):
        ended = start(root, steps=4)
        assert ended.code == 2
        assert f"dataset.root: {tmp_path}/images -> {tmp_path}/{root}, but these are not the images" in ended.err
        assert ended.err.count("\n") == 1
    assert (tmp_path / "run/config.yaml").read_bytes() == before
    ended = start("edited", "seed=1", steps=4)
    assert (ended.code, "what differs: seed: 0 -> 1. Use" in ended.err) == (2, True)


def test_copies_with_other_times_need_the_setting_for_copies(start: Callable[..., Ended], tmp_path: Path) -> None:
    shutil.copytree(tmp_path / "images", tmp_path / "copy")
    for path in (tmp_path / "copy").rglob("*.png"):
        os.utime(path, (1, 1))
    ended = start("copy", steps=4)
    assert (ended.code, "resume with dataset.verify=sizes" in ended.err) == (2, True)
    assert start("copy", "dataset.verify=sizes", steps=4).code == 0
    assert start("copy", steps=5).code == 0


def test_a_run_without_a_fingerprint_keeps_its_path() -> None:
    stored = {"dataset": {"_target_": "sslcli.data.sources.files.Folder", "root": "/a"}, "effective": {}}
    now = {"dataset": stored["dataset"] | {"root": "/b"}}
    assert possibly_moved(stored, now) == ()
    stored["effective"] = {"image fingerprint": "0"}
    assert possibly_moved(stored, now) == ("dataset.root",)
    assert possibly_moved(stored, {"dataset": {"_target_": "sslcli.data.sources.files.Folder"}}) == ()
    assert earlier_moved({"effective": {"moved paths": "x"}}) == ()
