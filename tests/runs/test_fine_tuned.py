"""Saved networks of protocols, as teachers."""

from __future__ import annotations

import hashlib
from pathlib import Path

from command_line import Cli, result

QUICK = ["protocol.steps=2", "protocol.batch_size=16", "protocol.lrs=[0.02,0.1]"]


def test_a_fine_tuned_net_is_kept_and_teaches_a_student(trained: Path, cli: Cli) -> None:
    line = [f"run={trained}", "protocol=distill", "protocol.steps=2"]
    ended = cli("ssl-eval", *line)
    assert ended.code == 2
    assert "protocol=finetune" in ended.err
    checkpoint = (trained / "checkpoints/step-00000003.pt").read_bytes()
    ended = cli("ssl-eval", f"run={trained}", "protocol=finetune", *QUICK)
    assert (ended.code, ended.err) == (0, "")
    tuned = result(trained / "eval", "finetune")
    assert (trained / "checkpoints/step-00000003.pt").read_bytes() == checkpoint
    kept = trained / "eval" / tuned["net"]
    assert tuned["net_sha256"] == hashlib.sha256(kept.read_bytes()).hexdigest()
    assert tuned["checkpoint_sha256"] == hashlib.sha256(checkpoint).hexdigest()
    assert tuned["baselines"].keys() == {"random"}
    assert (tuned["feature_layer"], tuned["n_train"], tuned["n_test"]) == ("backbone", 200, 100)
    for arm in (tuned, tuned["baselines"]["random"]):
        assert f"{100 * arm['top1']:.1f} %" in ended.out
    student = "protocol.student={_target_: sslcli.backbones.small.Small, image_size: 32, width: 4}"
    for extra, name in (([], "distill"), ([student], "distill_student-Small-??????")):
        ended = cli("ssl-eval", *line, *extra)
        assert (ended.code, ended.err) == (0, "")
        taught = result(trained / "eval", name)
        assert taught["teacher"]["sha256"] == tuned["net_sha256"]
        assert taught["teacher"]["top1"] == tuned["top1"]
        assert f"teacher (200 labels): {100 * tuned['top1']:.1f} %" in ended.out
    assert taught["student"] == "Small"
    ended = cli("ssl-eval", *line, student.replace("width: 4", "in_channels: 1"))
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert "Small does not accept images of shape (2, 3, 32, 32)" in ended.err
    ended = cli("ssl-eval", f"run={trained}", "protocol=finetune", *QUICK)
    clock = {"seconds": 0}
    assert result(trained / "eval", "finetune") | clock == tuned | clock
    assert kept.read_bytes()
