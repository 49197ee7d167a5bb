"""ssl-train from the command line to the run directory."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from command_line import SMALL, Cli, installed
from small_runs import make_folder, metrics

QUICK = [*SMALL, "monitor.knn_every_epochs=0", "monitor.health_every_steps=0", "monitor.pictures=0"]
FILES = ["checkpoints", "config.yaml", "console.log", "done", "environment.json", "images.npz", "metrics.jsonl"]
FILES += ["overrides.txt"]


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def config_of(run_dir: Path) -> dict[str, Any]:
    found = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert isinstance(found, dict)
    return found


def test_a_run_directory_holds_what_is_promised(run_dir: Path) -> None:
    assert files(run_dir) == sorted([*FILES, "tensorboard", "views.png"])
    assert run_dir.name.startswith("simclr_shapes_small_")
    assert (run_dir / "overrides.txt").read_text().split() == [*SMALL, "monitor.knn_k=10"]
    checkpoints = run_dir / "checkpoints"
    assert files(checkpoints) == ["last", "step-00000003.pt", "step-00000003.sha256"]
    assert os.readlink(checkpoints / "last") == "step-00000003.pt"
    Image.open(run_dir / "views.png").verify()


def test_config_yaml_holds_every_value_and_what_they_come_to(run_dir: Path) -> None:
    config = config_of(run_dir)
    assert config["backbone"]["image_size"] == 32  # an interpolation in the yaml
    assert config["train"]["batch_size"] == 32
    effective = config["effective"]
    assert effective["steps"] == 3
    assert effective["training images"] == 200
    assert effective["images per step"] == 32
    assert effective["learning rate"] == pytest.approx(config["optimizer"]["lr"] * 32 / 256)
    assert effective["negatives per query"] == 62
    assert effective["CPU threads per process"] == 1


def test_environment_json_tells_versions_device_and_code(run_dir: Path) -> None:
    environment = json.loads((run_dir / "environment.json").read_text())["first"]
    assert environment["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert {"python", "platform", "host", "device", "threads", "git", "command"} <= environment.keys()


def test_metrics_have_their_stable_names(run_dir: Path) -> None:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    always = {"step", "epoch", "wall", "train/loss", "train/lr", "train/images_per_s", "train/data_wait"}
    assert all(always <= line.keys() for line in lines)
    assert {"monitor/knn_top1", "monitor/knn_top5"} <= lines[-1].keys()
    assert {"health/rankme", "health/alignment", "health/uniformity"} <= lines[0].keys()


def test_tensorboard_holds_the_same_scalars(run_dir: Path) -> None:
    events = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    seen = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert seen == [(line["step"], pytest.approx(line["train/loss"])) for line in lines]


def test_console_log_tells_the_effective_values_and_the_end(run_dir: Path, work_dir: Path) -> None:
    text = (run_dir / "console.log").read_text()
    for part in ("learning rate: ", "negatives per query: 62", "step 3/3", f"done: {run_dir}", "k-NN"):
        assert part in text


def test_the_same_command_finds_its_directory_and_that_it_is_done(run_dir: Path, work_dir: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*") if path.is_file()}
    output = installed(work_dir, "ssl-train", *reversed(SMALL), "monitor.knn_k=10")
    assert f"this run is finished already: {run_dir}" in output
    assert len(list((work_dir / "runs").iterdir())) == 1
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*") if path.is_file()} == before


def test_another_configuration_is_refused_with_what_differs(run_dir: Path, cli: Cli) -> None:
    line = [*SMALL, "monitor.knn_k=10", f"run_dir={run_dir}"]
    ended = cli("ssl-train", *line, "method.temperature=0.3", "train.batch_size=8")
    assert ended.code == 2
    assert "method.temperature: 0.1 -> 0.3" in ended.err
    assert "train.batch_size: 32 -> 8" in ended.err
    assert "run_dir" in ended.err
    neutral = ["name=x", "train.keep=9", "train.save_every_steps=1", "dataset.workers=1", "device=cpu"]
    ended = cli("ssl-train", *line, *neutral, "train.max_time=5m")
    assert (ended.code, ended.err) == (0, "")


NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, stride=4)

    def forward(self, images):
        return self.conv(images).relu()
"""


def test_a_backbone_of_the_users_own_trains(tmp_path: Path) -> None:
    (tmp_path / "mynet_of_test.py").write_text(NET)
    (tmp_path / "my/backbone").mkdir(parents=True)
    (tmp_path / "my/backbone/mine.yaml").write_text("_target_: mynet_of_test.Net\nwidth: 12\n")
    line = [*QUICK, "--config-dir", "my", "backbone=mine", "run_dir=out"]
    assert "add trust=[mynet_of_test]" in installed(tmp_path, "ssl-train", *line, code=2)
    assert "Did you mean 'width'?" in installed(
        tmp_path, "ssl-train", *line, "trust=[mynet_of_test]", "+backbone.widht=3", code=2
    )
    installed(tmp_path, "ssl-train", *line, "trust=[mynet_of_test]")
    assert config_of(tmp_path / "out")["effective"]["backbone features"] == 12
    assert (tmp_path / "out/done").exists()


def test_without_labels_the_knn_is_skipped_and_said_so(cli: Cli, tmp_path: Path) -> None:
    make_folder(tmp_path / "images", broken=0)
    line = ["dataset=flat", "dataset.root=images", "dataset.image_size=16", "dataset.workers=0", "run_dir=out"]
    ended = cli("ssl-train", *[part for part in SMALL if not part.startswith("dataset")], *line)
    assert (ended.code, ended.err) == (0, "")
    assert "k-NN is skipped" in ended.out
    assert all("monitor/knn_top1" not in line for line in metrics(tmp_path / "out"))
    assert (tmp_path / "out/done").exists()


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("train.batch_size=4096", ["train.batch_size is 4096", "200 images"]),
        ("train.batch_size=1", ["train.batch_size is 1", "BatchNorm"]),
        ("train.batch_size=32 train.accumulate=32", ["train.batch_size is 32", "at least 64"]),
        ("device=cuda:77", ["device is 'cuda:77'"]),
        ("backbone.in_channels=1", ["backbone", "3 channels"]),
        ("backbone.width=-1", ["backbone", "width is -1"]),
        ("method.dim=-1", ["method", "-1"]),
        ("views=instdisc", ["method needs 2 views", "views=..."]),
        ("+dataset.nuisances.colr=1", ["dataset.nuisances has the unknown key 'colr'", "color"]),
        ("trust=[nonesuch] backbone._target_=nonesuch.Net", ["nonesuch.Net", "neither installed"]),
        ("optimizer._target_=torch.optim.SGDD", ["SGDD", "Did you mean 'SGD'?"]),
        ("run_dir=/proc/out", ["run_dir is /proc/out", "cannot be written"]),
        ("run_dir=/proc/out dry_run=true", ["run_dir is /proc/out", "cannot be written"]),
        ("run_dir=/proc/version", ["run_dir is /proc/version", "a file"]),
    ],
)
def test_what_only_building_can_find_is_refused_likewise(line: str, wanted: list[str], cli: Cli) -> None:
    ended = cli("ssl-train", *QUICK, *line.split())
    assert ended.code == 2, ended
    assert [part for part in wanted if part not in ended.err] == [], ended.err
    assert ended.err.count("\n") == 1
    assert not Path("runs").exists()


def test_a_folder_of_images_that_is_not_there_is_refused(cli: Cli) -> None:
    ended = cli("ssl-train", "dataset=folder", "dataset.root=nowhere", "launcher.threads=1")
    assert ended.code == 2
    assert f"dataset.root is {Path('nowhere').absolute()}, but " in ended.err
    assert ended.err.count("\n") == 1
