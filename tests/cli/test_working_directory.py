"""Runs that are started, resumed, evaluated and exported from other working directories, and whose images are moved."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from command_line import Cli, installed
from small_runs import make_folder
from sslcli.runs import launch
from sslcli.runs.directory import read_config

SHORT = [
    "backbone.width=4",
    "dataset.image_size=32",
    "dataset.workers=0",
    "train.batch_size=8",
    "train.max_steps=2",
    "train.log_every_steps=1",
    "monitor.health_every_steps=0",
    "monitor.pictures=0",
    "monitor.knn_k=5",
    "launcher.threads=1",
]
FOLDER = ["dataset=folder", "dataset.root=images"]
KNN = ["protocol=knn", "baselines=false"]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images and a run trained on them by a relative path. Tests copy it and must not modify it."""
    work = tmp_path_factory.mktemp("original")
    make_folder(work / "images", broken=0)
    installed(work, "ssl-train", *FOLDER, "name=x", *SHORT)
    return work


@pytest.fixture
def work(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli) -> Path:
    """A copy of the folder, whose run has the path of the copied images; the working directory is another folder."""
    copy = Path(shutil.copytree(original, tmp_path / "work", symlinks=True))
    rewrite(copy, root=str(copy / "images"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return copy


def rewrite(work: Path, *, fingerprint: bool = True, **dataset: Any) -> None:
    """Change the dataset of the run's stored configuration, as if it had been started with these values."""
    path = work / "runs" / "x" / "config.yaml"
    config = OmegaConf.load(path)
    config.dataset.update(dataset)
    if not fingerprint:
        del config.effective["image fingerprint"]
    OmegaConf.save(config, path)


def results(work: Path) -> dict[str, Any]:
    return {path.stem: json.loads(path.read_text()) for path in (work / "runs/x/eval").glob("*.json")}


def test_a_run_stores_absolute_paths_and_is_evaluated_from_anywhere(original: Path, work: Path, cli: Cli) -> None:
    assert read_config(original / "runs" / "x")["dataset"]["root"] == str(original / "images")
    ended = cli("ssl-eval", "run=../work/runs/x", *KNN)
    assert (ended.code, ended.err) == (0, "")
    assert results(work)["knn"]["pretrained_on"] == "images"
    assert os.listdir() == []


@pytest.mark.parametrize("fingerprint", [True, False])
def test_images_that_moved_are_the_runs_own(work: Path, cli: Cli, fingerprint: bool) -> None:
    rewrite(work, fingerprint=fingerprint)
    (work / "images").rename(work / "moved")
    ended = cli("ssl-eval", f"run={work}/runs/x", *KNN)
    assert ended.code == 2
    assert f"dataset.root of the run is {work}/images" in ended.err
    assert "add dataset.root=FOLDER" in ended.err
    ended = cli("ssl-eval", f"run={work}/runs/x", *KNN, "dataset.root=../work/moved")
    assert (ended.code, ended.err) == (0, "")
    assert list(results(work)) == ["knn"]


def test_other_images_have_a_result_of_their_own(work: Path, cli: Cli) -> None:
    make_folder(work / "new" / "images", per_class=20, broken=0)
    rewrite(work, fingerprint=False)
    for line in ([], [f"dataset.root={work}/new/images"], ["dataset.limit=20"]):
        ended = cli("ssl-eval", f"run={work}/runs/x", *KNN, *line)
        assert (ended.code, ended.err) == (0, "")
    assert len(results(work)) == 3
    assert "knn" in results(work)
    ended = cli("ssl-eval", f"run={work}/runs/x", *KNN, "dataset.workers=1")
    assert (ended.code, len(results(work))) == (0, 3)


def test_an_old_run_with_a_relative_path_means_the_current_directory(
    work: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewrite(work, root="images", fingerprint=False)
    ended = cli("ssl-eval", f"run={work}/runs/x", *KNN)
    assert ended.code == 2
    assert f"{Path.cwd()}/images: if the images were moved, add dataset.root=FOLDER" in ended.err
    ended = cli("ssl-eval", f"run={work}/runs/x", *KNN, f"dataset.root={work}/images")
    assert (ended.code, list(results(work))) == (0, ["knn"])
    monkeypatch.chdir(work)
    assert cli("ssl-eval", "run=runs/x", *KNN).code == 0
    ended = cli("ssl-train", *FOLDER, "name=x", *SHORT)
    assert (ended.code, ended.err) == (0, "")
    assert "finished already" in ended.out


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("dataset.roott=/x", ["dataset.roott", "Did you mean 'root'?"]),
        ("+dataset.roott=/x", ["dataset.roott", "Did you mean 'root'?"]),
        ("dataset.root.deeper=/x", ["dataset.root.deeper", "has no keys"]),
        ("dataset.limit=abc", ["dataset.limit is 'abc'", "integer or null"]),
        ("dataset.limit=0", ["dataset.limit is 0", "at least 1"]),
        ("dataset.test=5", ["dataset.test is ", "/5 cannot be opened", "No such file"]),
        ("~dataset.root", ["~dataset.root", "cannot be deleted"]),
        ("dataset._target_=os.system", ["dataset._target_ is 'os.system'", "trust"]),
        ("dataset.root=~nobody-knows/x", ["'~nobody-knows/x'", "home directory is unknown"]),
        ("dataset.root=${nonesuch}", ["dataset.root", "nonesuch"]),
        ("dataset.root=/nonesuch", ["/nonesuch cannot be opened", "add dataset.root=FOLDER"]),
    ],
)
def test_a_wrong_change_of_the_images_is_refused(work: Path, cli: Cli, override: str, expected: list[str]) -> None:
    ended = cli("ssl-eval", f"run={work}/runs/x", *KNN, override)
    assert ended.code == 2
    assert ended.err.count("\n") == 1
    assert all(part in ended.err for part in expected), ended.err
    assert not results(work)


def test_changes_need_a_run_or_a_chosen_image_set(work: Path, cli: Cli) -> None:
    (work / "net.pt").touch()
    ended = cli("ssl-eval", f"weights={work}/net.pt", "backbone=small", "dataset.root=/x")
    assert (ended.code, "choose one with dataset=..." in ended.err) == (2, True)
    ended = cli("ssl-train", "dataset.roott=/x")
    assert (ended.code, "dataset.roott" in ended.err) == (2, True)


def test_changes_hold_for_every_run_of_a_folder(work: Path, cli: Cli) -> None:
    (work / "images").rename(work / "moved")
    shutil.copytree(work / "runs" / "x", work / "runs" / "y", symlinks=True)
    ended = cli("ssl-eval", f"run={work}/runs", *KNN, f"dataset.root={work}/moved")
    assert (ended.code, ended.err) == (0, "")
    assert all((work / "runs" / name / "eval" / "knn.json").exists() for name in "xy")
    ended = cli("ssl-eval", f"run={work}/runs", *KNN, "dataset.roott=/x")
    assert (ended.code, "Did you mean 'root'?" in ended.err) == (2, True)


def test_a_tilde_is_the_home_in_every_command(
    work: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(work))
    assert cli("ssl-eval", "run=~/runs/x", *KNN, "dataset.root=~/images").code == 0
    assert cli("ssl-export", "run=~/runs/x", "out=~/deep/net.pt").code == 0
    assert (work / "deep" / "net.pt").exists()
    ended = cli("ssl-eval", "weights=~/deep/net.pt", *KNN, "dataset=folder", "dataset.root=~/images", *SHORT[1:3])
    assert (ended.code, ended.err) == (0, "")
    started: list[dict[str, Any]] = []
    monkeypatch.setattr(launch, "launch", lambda config: started.append(config) or 0)
    (work / "conf" / "dataset").mkdir(parents=True)
    (work / "conf" / "dataset" / "mine.yaml").write_text("defaults: [folder]\nroot: ~/images\ntest: images\n")
    ended = cli("ssl-train", "--config-dir=~/conf", "dataset=mine", "run_dir=~/r", "dataset.keep_dir=~/k", *SHORT)
    assert (ended.code, ended.err) == (0, "")
    assert started[0]["run_dir"] == f"{work}/r"
    dataset = {"root": f"{work}/images", "test": f"{tmp_path}/elsewhere/images", "keep_dir": f"{work}/k"}
    assert started[0]["dataset"] | dataset == started[0]["dataset"]
    assert os.listdir() == []


def test_a_sweep_goes_to_the_home_and_not_to_a_folder_named_tilde(
    work: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch, quick_jobs: None
) -> None:
    monkeypatch.setenv("HOME", str(work))
    ended = cli("ssl-train", "--multirun", "seed=0,1", "hydra.sweep.dir=~/sweep", "sweep.jobs=1")
    assert (ended.code, ended.err) == (0, "")
    assert (work / "sweep" / "sweep.csv").exists()
    assert os.listdir() == []
