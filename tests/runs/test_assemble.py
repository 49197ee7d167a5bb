"""Parts of a run: k-NN during training, with labels that do not allow it."""

from __future__ import annotations

import json
from pathlib import Path

from command_line import Cli
from small_runs import make_folder

LINE = ["dataset=folder", "dataset.image_size=32", "dataset.workers=0", "dataset.val_fraction=0.5", "backbone.width=4"]
LINE += [
    "train.batch_size=8",
    "train.max_steps=2",
    "monitor.knn_every_epochs=1",
    "monitor.pictures=0",
    "launcher.threads=1",
]


def metrics(run_dir: Path) -> set[str]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return {name for line in lines for name in json.loads(line)}


def test_one_class_gives_no_accuracy_during_training(cli: Cli, tmp_path: Path) -> None:
    make_folder(tmp_path / "two", per_class=16, broken=0)
    (tmp_path / "one").mkdir()
    (tmp_path / "two/a").rename(tmp_path / "one/a")
    ended = cli("ssl-train", *LINE, f"dataset.root={tmp_path / 'one'}", f"run_dir={tmp_path / 'run'}")
    assert (ended.code, ended.err) == (0, "")
    assert "k-NN is skipped: the training images of one have a single class, 'a'" in ended.out.replace("\n", " ")
    assert "100.0 %" not in ended.out
    assert not [name for name in metrics(tmp_path / "run") if "knn" in name]


def test_one_image_a_class_is_warned_of_once(cli: Cli, tmp_path: Path) -> None:
    make_folder(tmp_path / "images", per_class=10, broken=0)
    for path in sorted((tmp_path / "images").glob("*/*.png")):
        (tmp_path / "images" / path.stem).mkdir()
        path.rename(tmp_path / "images" / path.stem / path.name)
    for name in ("a", "b"):
        (tmp_path / "images" / name).rmdir()
    ended = cli("ssl-train", *LINE, f"dataset.root={tmp_path / 'images'}", f"run_dir={tmp_path / 'run'}")
    assert (ended.code, ended.err) == (0, "")
    output = ended.out.replace("\n", " ")
    assert output.count("k-NN: of the held-out images 10 of 10 have classes that no training image has") == 1
    assert [name for name in metrics(tmp_path / "run") if "knn_top1" in name]
