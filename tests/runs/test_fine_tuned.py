"""Saved networks of protocols, as teachers."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from command_line import Cli, result
from damage import flip_a_bit
from sslcli.errors import ConfigError
from sslcli.report.console import Screen
from sslcli.runs.fine_tuned import find_result

QUICK = ["protocol.steps=2", "protocol.batch_size=16", "protocol.lrs=[0.02,0.1]"]


def test_a_fine_tuned_net_is_kept_and_teaches_a_student(trained: Path, cli: Cli) -> None:
    line = [f"run={trained}", "protocol=distill", "protocol.steps=2"]
    ended = cli("ssl-eval", *line)
    assert ended.code == 2
    assert "protocol=finetune" in ended.err
    checkpoint = (trained / "checkpoints/step-00000003.pt").read_bytes()
    ended = cli("ssl-eval", f"run={trained}", "protocol=finetune", *QUICK)
    assert (ended.code, ended.err) == (0, "")
    tuned = result(trained / "eval", "finetune_steps-2")
    assert (trained / "checkpoints/step-00000003.pt").read_bytes() == checkpoint
    kept = trained / "eval" / tuned["net"]
    assert tuned["net_sha256"] == hashlib.sha256(kept.read_bytes()).hexdigest()
    assert tuned["checkpoint_sha256"] == hashlib.sha256(checkpoint).hexdigest()
    assert tuned["baselines"].keys() == {"random"}
    assert (tuned["feature_layer"], tuned["n_train"], tuned["n_test"]) == ("backbone", 200, 100)
    for arm in (tuned, tuned["baselines"]["random"]):
        assert f"{100 * arm['top1']:.1f} %" in ended.out
    student = "protocol.student={_target_: sslcli.backbones.small.Small, image_size: 32, width: 4}"
    for extra, name in (([], ""), ([student], "_student-Small-??????")):
        ended = cli("ssl-eval", *line, *extra)
        assert (ended.code, ended.err) == (0, "")
        taught = result(trained / "eval", f"distill_finetune_steps-2{name}_steps-2")
        assert taught["teacher"]["sha256"] == tuned["net_sha256"]
        assert taught["teacher"]["top1"] == tuned["top1"]
        assert f"teacher (200 labels): {100 * tuned['top1']:.1f} %" in ended.out
    assert taught["student"] == "Small"
    ended = cli("ssl-eval", *line, student.replace("width: 4", "in_channels: 1"))
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert "Small does not accept images of shape (2, 3, 32, 32)" in ended.err
    ended = cli("ssl-eval", f"run={trained}", "protocol=finetune", *QUICK)
    clock = {"seconds": 0}
    assert result(trained / "eval", "finetune_steps-2") | clock == tuned | clock
    flip_a_bit(kept)
    ended = cli("ssl-eval", *line)
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert f"{kept} is damaged (it does not match the checksum in finetune_steps-2.json)" in ended.err


def evaluation_in(results_dir: Path, *, conditions: str = "") -> Any:
    """What `find_result` reads of an evaluation."""
    subject = SimpleNamespace(results_dir=results_dir)
    return SimpleNamespace(subject=subject, screen=Screen(silent=True), conditions=conditions)


def write_results(results_dir: Path, *names: str, net: bool = True) -> None:
    for name in names:
        content = {"protocol": name.partition("_")[0], "measured": name, "split": "test", "top1": 0.5}
        content |= {"interval": [0.4, 0.6], **({"net": f"{name}/net.pt"} if net else {})}
        (results_dir / f"{name}.json").write_text(json.dumps(content))


def test_a_teacher_is_found_by_its_protocol_or_with_its_variant(tmp_path: Path) -> None:
    write_results(tmp_path, "finetune", "semi_5pct")
    evaluation = evaluation_in(tmp_path)
    assert find_result(evaluation, "finetune")[0] == "finetune"
    assert find_result(evaluation, "semi")[0] == find_result(evaluation, "semi_5pct")[0] == "semi_5pct"


def test_several_teachers_of_a_protocol_need_a_choice(tmp_path: Path) -> None:
    write_results(tmp_path, "semi_5pct", "semi_10pct")
    with pytest.raises(ConfigError, match=r"'semi', .*: semi_10pct, semi_5pct"):
        find_result(evaluation_in(tmp_path), "semi")
    write_results(tmp_path, "finetune", "finetune_layer3")
    assert find_result(evaluation_in(tmp_path), "finetune")[0] == "finetune"


def test_results_without_a_network_or_of_other_conditions_are_no_teachers(tmp_path: Path) -> None:
    write_results(tmp_path, "knn", net=False)
    write_results(tmp_path, "finetune")
    for requested, conditions in (("knn", ""), ("finetune", "step-5"), ("semi", "")):
        with pytest.raises(ConfigError, match=f"there is no teacher '{requested}'"):
            find_result(evaluation_in(tmp_path, conditions=conditions), requested)
