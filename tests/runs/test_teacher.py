"""Runs of a method that distills: `teacher=FILE|run:DIR`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from command_line import Cli
from method_runs import config_of, teacher_overrides
from small_runs import differences, newest
from sslcli.backbones.small import Small
from sslcli.errors import ConfigError
from sslcli.runs.parts import build_parts

LINE = [
    "dataset.train_images=120", "dataset.test_images=20", "backbone.width=4", "train.batch_size=40",
    "train.max_steps=4", "train.save_every_steps=2", "monitor.pictures=0", "launcher.threads=1",
]  # fmt: skip


def test_a_run_records_its_teacher_and_neither_checkpoints_nor_probes_contain_it(cli: Cli, tmp_path: Path) -> None:
    source, run_dir = tmp_path / "source", tmp_path / "run"
    assert cli("ssl-train", *LINE, "backbone.width=6", f"run_dir={source}").code == 0
    line = ["method=distill", *LINE, f"run_dir={run_dir}", f"teacher=run:{source}"]
    ended = cli("ssl-train", *line)
    assert ended.code == 0, ended.err
    assert "tensors taken with the prefix backbone." in ended.out
    record = yaml.safe_load((run_dir / "config.yaml").read_text())["effective"]["teacher"]
    assert (record["run"], record["step"], record["features"]) == (str(source), 4, 48)
    whole = newest(run_dir)
    assert {name.partition(".")[0] for name in whole["method"]} == {"backbone", "head", "noise", "queue", "queue_head"}

    for name in ("done", "checkpoints/step-00000004.pt"):
        (run_dir / name).unlink()
    assert cli("ssl-train", *line).code == 0
    assert differences(newest(run_dir), whole) == []

    (run_dir / "done").unlink()
    assert cli("ssl-train", *LINE, "backbone.width=6", f"run_dir={source}", "train.max_steps=5").code == 0
    ended = cli("ssl-train", *line)
    assert (ended.code, "its weights have changed since the run in" in ended.err) == (2, True), ended.err

    source.rename(tmp_path / "moved")
    assert cli("ssl-eval", f"run={run_dir}", "protocol=knn", "feature_layer=projection").code == 0
    assert cli("ssl-export", f"run={run_dir}", "what=method", f"out={tmp_path}/method.pt").code == 0
    ended = cli("ssl-eval", f"weights={tmp_path}/method.pt", "dataset=shapes", *LINE[:2], "protocol=knn")
    assert ended.code == 0, ended.err


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["method=distill"], "teacher is null, but Distill needs a teacher: set teacher=FILE, run:DIR or timm:NAME"),
        (
            ["method=byol", "teacher=NET", "+backbone@teacher_backbone=small", "teacher_backbone.width=4"],
            "teacher is set, but BYOL has no teacher",
        ),
        (["method=distill", "teacher=NET"], "which does not state its backbone: set teacher_backbone, as in"),
        (["method=distill", "teacher=NET", "+backbone@teacher_backbone=resnet18"], "does not fit this net"),
        (["method=distill", "teacher=missing.pt"], "missing.pt cannot be read"),
        (["method=distill", "teacher=NET", "teacher_backbone={_target_: os.system}"], "os.system"),
        (
            ["method=distill", "teacher=NET", "+backbone@teacher_backbone=small", "+teacher_backbone.a=1"],
            "teacher_backbone",
        ),
    ],
)
def test_a_teacher_that_cannot_be_used_is_refused(
    cli: Cli, tmp_path: Path, overrides: list[str], expected: str
) -> None:
    torch.save(Small(width=4, image_size=32).state_dict(), tmp_path / "net.pt")
    given = [text.replace("NET", f"{tmp_path}/net.pt") for text in overrides]
    ended = cli("ssl-train", *given, *LINE, f"run_dir={tmp_path}/run")
    assert ended.code == 2
    assert expected in ended.err, ended.err
    assert not (tmp_path / "run").exists()


def test_a_file_that_does_not_state_its_backbone_gets_it_from_the_command(tmp_path: Path) -> None:
    parts = build_parts(config_of("distill"))
    assert parts.teacher is not None
    assert parts.teacher.record["features"] == parts.method.head.out_features == 48
    assert parts.teacher.record["weights"] in teacher_overrides("distill")[0]
    grayscale = config_of("distill").teacher_backbone | {"in_channels": 1}  # type: ignore[operator]
    with pytest.raises(ConfigError, match="which takes images with 1 channels, but those of shapes have 3"):
        build_parts(config_of("distill").changed(teacher_backbone=grayscale))
