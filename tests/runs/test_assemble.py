"""Parts of a run: k-NN during training, with labels that do not allow it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from command_line import Cli
from one_run import make_run
from small_runs import make_folder
from sslcli.data.sources.files import Folder
from sslcli.runs.assemble import suspicious_settings

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
    assert output.count("k-NN: of the images of val 10 of 10 have classes that no training image has") == 1
    assert [name for name in metrics(tmp_path / "run") if "knn_top1" in name]


def test_the_advised_queue_is_shorter_than_the_set_and_a_shortened_warmup_is_named(cli: Cli, tmp_path: Path) -> None:
    line = ["method=moco", "dataset.train_images=300", "dataset.test_images=0", "train.batch_size=90", "dry_run=true"]
    line += ["method.queue_size=4096", "train.epochs=2", "train.warmup_epochs=5", "backbone.width=4"]
    line += ["train.freeze_backbone_epochs=1"]
    output = cli("ssl-train", *line, f"run_dir={tmp_path / 'run'}").out
    assert "the queue holds 4,096 keys but there are 300 images" in output
    assert "are negatives of each other: use method.queue_size=256, and a method.momentum of about 0.99" in output
    assert "train.warmup_epochs=5 is 15 steps, but the warmup takes at most a quarter of a run, here 1 of 6" in output
    assert "train.freeze_backbone_epochs=1 is 3 steps, but the backbone is frozen for at most a quarter" in output
    line += ["method.queue_size=256", "train.warmup_epochs=0.3", "train.freeze_backbone_epochs=0.3"]
    assert "warning" not in cli("ssl-train", *line, f"run_dir={tmp_path / 'run'}").out


def test_a_long_queue_of_a_method_without_queued_negatives_has_a_warning_of_its_own(cli: Cli, tmp_path: Path) -> None:
    """NNCLR has no momentum, and its queue contains neighbors instead of negatives."""
    line = ["method=nnclr", "dataset.train_images=300", "dataset.test_images=0", "train.batch_size=90", "dry_run=true"]
    line += ["method.queue_size=4096", "train.epochs=2", "backbone.width=4", f"run_dir={tmp_path / 'run'}"]
    output = cli("ssl-train", *line).out.replace("\n", " ")
    assert "so an image is also compared with earlier embeddings of itself: use method.queue_size=256" in output
    assert "method.momentum" not in output


def test_held_out_images_that_cannot_be_read_are_named_before_the_first_step(cli: Cli, tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images", per_class=16, broken=0)
    line = [*LINE, f"dataset.root={root}", f"run_dir={tmp_path / 'run'}"]
    source = Folder(root=root, image_size=32, val_fraction=0.5)
    for position in source.splits["val"].tolist():
        Path(source.path(position)).write_bytes(b"")
    for extra in ([], ["dry_run=true"]):
        ended = cli("ssl-train", *line, *extra)
        assert ended.code == 2
        assert "none of the 16 images of val can be read" in ended.err
        assert "set dataset.val_fraction=0" in ended.err
        assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_the_queries_of_knn_are_printed_and_those_of_test_are_logged_under_another_name(
    cli: Cli, tmp_path: Path
) -> None:
    line = ["dataset.train_images=100", "dataset.test_images=20", "backbone.width=4", "train.batch_size=50"]
    line += ["train.max_steps=1", "monitor.pictures=0", "launcher.threads=1"]
    for settings, queries, name in (
        ([], "10 images of val, pre-trained on without labels; bank: 90 other training images", "knn_top1"),
        (["dataset.pretrain_on_val=false"], "10 images of val, not pre-trained on; bank: 90", "knn_top1"),
        (["monitor.knn_split=test"], "20 images of test; bank: 90 other training images", "test_knn_top1"),
    ):
        run_dir = tmp_path / f"{len(settings)}{name}"
        ended = cli("ssl-train", *line, *settings, f"run_dir={run_dir}")
        assert ended.code == 0, ended.err
        assert queries in " ".join(ended.out.split())
        logged = {key: value for text in (run_dir / "metrics.jsonl").open() for key, value in json.loads(text).items()}
        assert [key for key in logged if key.endswith("knn_top1")] == [f"monitor/{name}"]
        assert cli("ssl-eval", f"run={run_dir}", "protocol=knn", "baselines=false").code == 0
        result = json.loads((run_dir / "eval/knn.json").read_text())
        assert result[name.replace("knn_", "")] == logged[f"monitor/{name}"]


def test_queries_of_a_dataset_without_test_images_are_refused(cli: Cli, tmp_path: Path) -> None:
    line = ["dataset.test_images=0", "monitor.knn_split=test", f"run_dir={tmp_path / 'run'}"]
    ended = cli("ssl-train", *line)
    assert ended.code == 2
    assert "monitor.knn_split is 'test', but shapes has no test images: set monitor.knn_split=val" in ended.err
    ended = cli("ssl-train", "--multirun", "seed=0,1", "sweep.metric=monitor/test_knn_top1")
    assert ended.code == 2
    assert "the test images must not select a run: rank the jobs by monitor/knn_top1" in ended.err


def test_the_linear_probe_trains_on_val_only_if_it_reports_on_test(cli: Cli, tmp_path: Path) -> None:
    line = ["dataset.train_images=100", "backbone.width=4", "train.batch_size=50", "train.max_steps=1"]
    line += ["monitor.pictures=0", "launcher.threads=1"]
    for number, (settings, expected) in enumerate(
        (
            (["dataset.test_images=20"], ("test", 100, 20)),
            (["dataset.test_images=20", "dataset.pretrain_on_val=false"], ("test", 90, 20)),
            (["dataset.test_images=0"], ("val", 90, 10)),
        )
    ):
        run_dir = tmp_path / str(number)
        assert cli("ssl-train", *line, *settings, f"run_dir={run_dir}").code == 0
        assert cli("ssl-eval", f"run={run_dir}", "protocol=linear", "protocol.epochs=1", "baselines=false").code == 0
        result = json.loads((run_dir / "eval/linear.json").read_text())
        assert (result["split"], result["n_train"], result["n_test"]) == expected


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["train.clip_grad_by=tensor"], "train.clip_grad_by=tensor has no effect, because train.clip_grad is null"),
        (["train.schedule_length=1.25", "train.schedule=step"], "train.schedule_length=1.25 does not change the learn"),
        (["train.clip_grad_by=tensor", "train.clip_grad=3", "train.schedule_length=1.25"], None),
    ],
)
def test_settings_without_an_effect_are_warned_of(overrides: list[str], expected: str | None, tmp_path: Path) -> None:
    run = make_run(tmp_path, *overrides)
    run.stop.close()
    run.monitor.close()
    parts: Any = SimpleNamespace(method=run.method, source=run.loader.source)
    found = suspicious_settings(run, parts)
    assert len(found) == (expected is not None)
    assert expected is None or found[0].startswith(expected)
