"""Changed images: a run resumes only with the images it started with; an evaluation uses the current ones."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from command_line import Cli, Ended
from processes import Pair
from small_runs import make_folder
from sslcli.data.sources.files import Folder
from sslcli.distributed import collectives
from sslcli.errors import ConfigError
from sslcli.report.console import Screen
from sslcli.runs import image_changes
from sslcli.runs.image_changes import check_images

LINE = [
    "dataset=folder",
    "dataset.root=images",
    "dataset.image_size=32",
    "dataset.workers=0",
    "backbone.width=4",
    "train.batch_size=16",
    "train.max_steps=2",
    "train.save_every_steps=1",
    "monitor.knn_every_epochs=0",
    "monitor.pictures=0",
    "launcher.threads=1",
    "run_dir=run",
]
KNN = ["run=run", "protocol=knn", "baselines=false"]


@pytest.fixture
def run(cli: Cli, tmp_path: Path) -> Callable[..., Ended]:
    """Resume the run from its last checkpoint, with additional arguments."""
    for path in make_folder(tmp_path / "images", broken=0).rglob("*.png"):
        path.write_bytes(path.read_bytes().ljust(4096))  # so that all sizes are equal
    assert cli("ssl-train", *LINE).code == 0

    def again(*more: str) -> Ended:
        (tmp_path / "run/done").unlink(missing_ok=True)
        return cli("ssl-train", *LINE, *more)

    return again


def overwrite(images: Path) -> None:
    for number in (0, 2, 4, 6):
        path = images / "a" / f"{number:03d}.png"
        path.write_bytes(path.read_bytes()[:-1] + b"x")
        later(path)


def later(path: Path) -> None:
    """Change the time of a file, which a write within the same clock tick does not."""
    found = os.stat(path)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns + 10**6))


def grow(images: Path) -> None:
    path = images / "a/000.png"
    path.write_bytes(path.read_bytes() + b"x")


def rename(images: Path) -> None:
    for number in (1, 3, 5):
        (images / f"b/{number:03d}.png").rename(images / f"b/new{number}.png")


def test_a_run_whose_images_are_as_they_were_goes_on(run: Callable[..., Ended], tmp_path: Path) -> None:
    before = (tmp_path / "run/images.npz").stat().st_mtime_ns
    ended = run()
    assert (ended.code, ended.err) == (0, "")
    assert "continuing from step 2" in ended.out
    assert (tmp_path / "run/images.npz").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (overwrite, "of 60 images, 4 changed in modification time (a/000.png, a/002.png, a/004.png, ...)"),
        (rename, "of 60 images, 3 appeared (b/new1.png, b/new3.png, b/new5.png), 3 vanished (b/001.png, "),
        (lambda images: later(images / "a/000.png"), "of 60 images, 1 changed in modification time (a/000.png)"),
        (grow, "of 60 images, 1 changed in label, size or contents (a/000.png)"),
    ],
)
@pytest.mark.parametrize("dry", [False, True])
def test_a_run_whose_images_changed_is_refused(
    run: Callable[..., Ended], tmp_path: Path, change: Callable[[Path], object], expected: str, dry: bool
) -> None:
    change(tmp_path / "images")
    before = (tmp_path / "run/images.npz").read_bytes()
    for _ in range(2):
        ended = run(f"dry_run={str(dry).lower()}")
        assert ended.code == 2
        assert "the images of images changed since this run began" in ended.err
        assert expected in ended.err
        assert ended.err.count("\n") == 1
    assert (tmp_path / "run/images.npz").read_bytes() == before
    ended = run("run_dir=other")
    assert (ended.code, ended.err) == (0, "")


def test_copied_images_are_accepted_once_by_size_and_stay_so(run: Callable[..., Ended], tmp_path: Path) -> None:
    for path in (tmp_path / "images").rglob("*.png"):
        later(path)
    assert "resume with dataset.verify=sizes" in run().err
    assert run("dataset.verify=sizes").code == 0
    assert run().code == 0
    (tmp_path / "images/a/000.png").write_bytes(b"x")
    assert run("dataset.verify=sizes").code == 2


def test_contents_are_compared_once_they_are_stored(run: Callable[..., Ended], tmp_path: Path) -> None:
    path = tmp_path / "images/a/000.png"
    assert run("dataset.verify=contents").code == 0
    later(path)
    assert "resume with dataset.verify=contents" in run().err
    assert run("dataset.verify=contents").code == 0
    times = os.stat(path).st_mtime_ns
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    os.utime(path, ns=(times, times))
    assert run().code == 0  # a change that only the contents show
    ended = run("dataset.verify=contents")
    assert ended.code == 2
    assert "of 60 images, 1 changed in label, size or contents (a/000.png)" in ended.err


def test_contents_are_not_accepted_unseen_where_none_were_stored(run: Callable[..., Ended], tmp_path: Path) -> None:
    overwrite(tmp_path / "images")
    assert run("dataset.verify=contents").code == 2


def test_nothing_is_compared_where_that_is_asked_for(run: Callable[..., Ended], tmp_path: Path) -> None:
    overwrite(tmp_path / "images")
    before = (tmp_path / "run/images.npz").read_bytes()
    assert run("dataset.verify=none").code == 0
    assert (tmp_path / "run/images.npz").read_bytes() == before
    assert run().code == 2


def test_a_run_of_an_older_version_notes_its_images(run: Callable[..., Ended], tmp_path: Path) -> None:
    (tmp_path / "run/images.npz").unlink()
    assert run().code == 0
    overwrite(tmp_path / "images")
    assert run().code == 2


def test_a_run_without_a_checkpoint_begins_with_the_images_there_are(run: Callable[..., Ended], tmp_path: Path) -> None:
    rename(tmp_path / "images")
    shutil.rmtree(tmp_path / "run/checkpoints")
    assert run().code == 0
    assert run().code == 0


def test_a_damaged_file_is_named_with_the_way_out(run: Callable[..., Ended], tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "run/images.npz").write_bytes(b"PK damaged")
    ended = run()
    assert ended.code == 2
    assert "run/images.npz is damaged (" in ended.err
    assert "or delete the file" in ended.err
    ended = cli("ssl-eval", *KNN)
    assert (ended.code, ended.err) == (0, "")
    assert "images.npz is damaged" in ended.out
    (tmp_path / "run/images.npz").unlink()
    assert run().code == 0


def refused(folder: Path) -> str:
    """Return the message of a process about changed images; each process has different ones."""
    source = Folder(root=str(folder / f"images{collectives.rank()}"), image_size=8, workers=0)
    try:
        check_images(folder, source, Screen(silent=True), write=True)
    except ConfigError as error:
        return str(error)
    return ""


def test_all_processes_refuse_what_the_main_one_refuses(pair: Pair, tmp_path: Path) -> None:
    for rank in range(2):
        make_folder(tmp_path / f"images{rank}", per_class=4, broken=0)
    assert pair.run(refused, tmp_path) == ["", ""]
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/step-00000001.pt").touch()
    later(tmp_path / "images1/a/000.png")
    assert pair.run(refused, tmp_path) == ["", ""]  # the main process compares, and its images are the same
    later(tmp_path / "images0/a/000.png")
    first, second = pair.run(refused, tmp_path)
    assert first == second
    assert "of 8 images, 1 changed in modification time (a/000.png)" in first


def measured(tmp_path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((tmp_path / "run/eval/knn.json").read_text())
    return found


@pytest.mark.usefixtures("run")
def test_an_evaluation_of_other_images_computes_its_features_anew_and_warns(cli: Cli, tmp_path: Path) -> None:
    assert cli("ssl-eval", *KNN).code == 0
    before = measured(tmp_path)
    files = set((tmp_path / "run/eval/features").iterdir())
    ended = cli("ssl-eval", *KNN)
    assert "warning" not in ended.out
    assert set((tmp_path / "run/eval/features").iterdir()) == files
    for one, other in zip(
        sorted((tmp_path / "images/a").iterdir()), sorted((tmp_path / "images/b").iterdir()), strict=True
    ):
        content = one.read_bytes()
        one.write_bytes(other.read_bytes())
        other.write_bytes(content)
        later(one)
        later(other)
    ended = cli("ssl-eval", *KNN)
    assert (ended.code, ended.err) == (0, "")
    assert "warning: the images may have changed since the run was trained on them: of 60 images, 60 chan" in ended.out
    assert set((tmp_path / "run/eval/features").iterdir()) > files
    now = measured(tmp_path)
    fresh = cli("ssl-eval", *KNN, "cache=false")
    assert fresh.code == 0
    assert measured(tmp_path)["top1"] == now["top1"]
    assert now["dataset_fingerprint"] == before["dataset_fingerprint"]
    rename(tmp_path / "images")
    ended = cli("ssl-eval", *KNN)
    assert "warning: these are not the images that the run was trained on: of 60 images, 57 changed" in ended.out


@pytest.mark.usefixtures("run")
def test_a_teacher_of_other_images_is_refused(cli: Cli, tmp_path: Path) -> None:
    quick = ["run=run", "baselines=false", "protocol.steps=1", "protocol.batch_size=16"]
    assert cli("ssl-eval", *quick, "protocol=finetune", "protocol.lrs=[0.1]").code == 0
    assert cli("ssl-eval", *quick, "protocol=distill").code == 0
    later(tmp_path / "images/a/000.png")
    ended = cli("ssl-eval", *quick, "protocol=distill")
    assert ended.code == 2
    assert "was trained on other images: run protocol=finetune again" in ended.err


@pytest.mark.usefixtures("run")
def test_an_evaluation_of_images_with_other_times_alone_says_so(cli: Cli, tmp_path: Path) -> None:
    later(tmp_path / "images/a/000.png")
    ended = cli("ssl-eval", *KNN)
    assert ended.code == 0
    assert "the images may have changed since the run was trained on them: of 60 images, 1 changed in mod" in ended.out
    ended = cli("ssl-eval", *KNN, "dataset.verify=sizes")
    assert ended.code == 0
    assert "warning" not in ended.out


def test_reading_contents_shows_its_progress_and_tells_the_other_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signs: list[str] = []
    monkeypatch.setattr(image_changes.watchdog, "report_progress", signs.append)
    source = Folder(
        root=str(make_folder(tmp_path, per_class=200, broken=0)), image_size=8, workers=0, verify="contents"
    )
    image_changes.collect_records(source, Screen(silent=True))
    assert signs
    assert set(signs) == {"reading the images to compare them"}
