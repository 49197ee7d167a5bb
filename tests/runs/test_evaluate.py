"""Evaluation of a run or of a folder of runs: signals, tables and errors."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from command_line import Cli, result
from small_runs import make_folder
from sslcli.backbones.small import Small
from sslcli.config.run_config import EvalConfig
from sslcli.errors import ConfigError, TrainingFailed
from sslcli.runs import evaluate
from sslcli.system import atomic

FAST = ["protocol.epochs=2", "protocol.lrs=[0.1,1.0]", "protocol.weight_decays=[0.0,1e-4]"]


@pytest.mark.parametrize("protocol", ["linear", "linear_sgd", "finetune", "utility"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGHUP, 75), (signal.SIGINT, 130)])
def test_an_evaluation_that_a_signal_stops_says_so_and_can_be_started_again(
    protocol: str, number: signal.Signals, code: int, trained: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is started to ignore it
    handlers = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)]
    settings = {"linear": FAST, "linear_sgd": FAST[:2], "utility": [*QUICK, "protocol.seeds=1", "protocol.points=2"]}
    line = [f"run={trained}", f"protocol={protocol}", *settings.get(protocol, QUICK)]
    at = ("sslcli.evaluation.linear.fit_sgd", "sslcli.evaluation.training.Progress.__call__")[protocol != "linear"]

    def killed(*_: object, **__: object) -> None:
        os.kill(os.getpid(), number)
        time.sleep(5)

    with monkeypatch.context() as patch:
        patch.setattr(at, killed)
        ended = cli("ssl-eval", *line)
    assert ended.code == code
    assert ended.err.count("\n") == 1
    assert (f"stopped by {number.name}" if code == 75 else "interrupted") in ended.err
    assert [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert not list((trained / "eval").glob("*.json"))
    left = list((trained / "eval").rglob(".*"))
    ended = cli("ssl-eval", *line)
    assert (ended.code, ended.err, left) == (0, "", [])
    assert "features, trained" not in ended.out
    name = {
        "linear": "linear",
        "linear_sgd": "linear_sgd_epochs-2",
        "finetune": "finetune_steps-2",
        "utility": "utility_2-points_seeds-1_steps-2_inversion-linear",
    }
    assert result(trained / "eval", name[protocol])["protocol"] == protocol


QUICK = ["protocol.steps=2", "protocol.batch_size=16", "protocol.lrs=[0.02,0.1]"]


def test_a_folder_of_runs_becomes_a_table(trained: Path, cli: Cli, tmp_path: Path) -> None:
    for name in ("one", "two"):
        shutil.copytree(trained, tmp_path / "sweep" / name, symlinks=True)
    (tmp_path / "sweep/not_started").mkdir()
    ended = cli("ssl-eval", f"run={tmp_path / 'sweep'}", "protocol=knn", "baselines=false")
    assert (ended.code, ended.err) == (0, "")
    number = f"{100 * result(tmp_path / 'sweep/one/eval', 'knn')['top1']:.1f} %"
    rows = [line for line in ended.out.splitlines() if number in line]
    assert [name for name in ("one", "two") if any(name in row for row in rows)] == ["one", "two"]


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("run={run} checkpoint=2", ["checkpoint is 2", "steps: 3"]),
        ("run={run} checkpoint=99999999999999", ["checkpoint is 99999999999999", "steps: 3"]),
        ("run=images", ["images is neither a run directory"]),
        ("run={run} device=cuda:77", ["device is 'cuda:77'"]),
        ("run={run} dataset=flat dataset.root=images", ["images", "no labels"]),
        ("run={run} dataset=folder dataset.root=single", ["single class, 'a'", "at least two classes"]),
        ("run={run} dataset=folder dataset.root=nowhere", ["dataset.root is ", "nowhere, but"]),
        ("run={run} protocol=knn protocol.k=0", ["k=0", "at least 1"]),
        ("run={run} protocol=finetune protocol.from_layer=1", ["protocol.from_layer is 1", "0 is the backbone"]),
        ("run={run} protocol=knn feature_layer=bank", ["'bank', which this net does not have", "It has: backbone"]),
        ("run={run} protocol=finetune protocol.from_layer=1 feature_layer=block1", ["block1", "from_layer 1"]),
        ("run={run} protocol=distill", ["there is no teacher 'finetune'", "protocol=finetune"]),
        ("run={run}s", ["no such path. Did you mean", "contains:"]),
        ("run={run} protocol=semi protocol.labels_per_class=500", ["labels_per_class is 500", "labeled training"]),
        (
            "run={run} protocol=semi protocol.list=nowhere.txt",
            ["nowhere.txt cannot be read (No such file or directory)"],
        ),
        ("run={run} protocol=semi protocol.list=few.txt", ["2 of the 2 names in list=", "such as 'shapes[9999]'"]),
        (
            "run={run} dataset.val_fraction=0 dataset.test_images=0",
            ["no images of shapes are held", "set it above 0"],
        ),
        ("run={run} dataset.val_fraction=1e-6 dataset.test_images=0", ["rounded to 0: set dataset.val_fraction to at"]),
        ("run={run} dataset.limit=1", ["dataset.limit is 1", "increase it"]),
        ("run={run} dataset=folder dataset.root=images dataset.test=images", ["is the same folder as dataset.root"]),
        ("run={run} dataset=parallel dataset.root=many", ["many have 4 channels", "trained on images with 3 channels"]),
        ("weights=images/a/000.png backbone=small dataset=shapes dataset.limit=50", ["000.png"]),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_message(
    line: str, wanted: list[str], trained: Path, cli: Cli, tmp_path: Path
) -> None:
    make_folder(tmp_path / "images", per_class=4, broken=0)
    shutil.copytree(tmp_path / "images/a", tmp_path / "single/a")
    (tmp_path / "few.txt").write_text("shapes[9999]\nshapes[9998]\n")
    for modality in ("rgb", "depth"):
        make_folder(tmp_path / "many" / modality, per_class=10, broken=0)
    ended = cli("ssl-eval", *line.format(run=trained).split())
    assert ended.code == 2, ended
    assert [part for part in wanted if part not in ended.err] == [], ended.err
    assert ended.err.count("\n") == 1
    assert not list((trained / "eval").glob("*.json"))


def test_images_that_the_network_does_not_accept_are_refused_before_features_are_computed(
    trained: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = Small.forward

    def strict(self: Small, images: Tensor) -> Tensor:
        assert images.shape[-1] == 32, "the input must have 32 pixels"
        return forward(self, images)

    monkeypatch.setattr(Small, "forward", strict)
    ended = cli("ssl-eval", f"run={trained}", "dataset=shapes", "dataset.image_size=48", "dataset.limit=50")
    assert ended.code == 2
    assert "3 channels and 48x48 pixels, which the network does not accept (the input must have 32 pix" in ended.err
    assert "set dataset.image_size to 32" in ended.err
    assert "features" not in ended.out


def test_a_run_that_names_a_strange_class_is_refused(trained: Path, cli: Cli) -> None:
    path = trained / "config.yaml"
    path.write_text(path.read_text().replace("sslcli.backbones.small.Small", "os.system"))
    ended = cli("ssl-eval", f"run={trained}")
    assert ended.code == 2
    assert "os.system" in ended.err
    assert "trust" in ended.err


def test_a_damaged_run_of_a_folder_is_reported_and_the_others_are_evaluated(
    trained: Path, cli: Cli, tmp_path: Path
) -> None:
    runs = [Path(shutil.copytree(trained, tmp_path / "sweep" / name, symlinks=True)) for name in ("a", "b", "c", "d")]
    (runs[0] / "config.yaml").write_bytes((runs[0] / "config.yaml").read_bytes()[:300])
    for path in (runs[1] / "checkpoints").glob("step-*.pt"):
        path.write_bytes(b"")
    ended = cli("ssl-eval", f"run={tmp_path / 'sweep'}", "protocol=knn", "baselines=false", "dataset.workers=0")
    assert ended.code == 2
    assert ended.err.count("\n") == 2
    assert f"{runs[0] / 'config.yaml'} is damaged (" in ended.err
    assert f"{runs[1]}/checkpoints/" in ended.err
    assert "2 of 4 runs could not be evaluated" in ended.out
    number = f"{100 * result(runs[2] / 'eval', 'knn')['top1']:.1f} %"
    assert len([line for line in ended.out.splitlines() if number in line and " to " in line]) == 2


def test_the_exit_code_of_a_folder_is_that_of_the_worst_run(
    trained: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        shutil.copytree(trained, tmp_path / "sweep" / name, symlinks=True)

    def fail(config: EvalConfig, *_: object) -> dict[str, Any]:
        raise TrainingFailed("the disk is full") if str(config.run).endswith("a") else ConfigError("damaged")

    monkeypatch.setattr(evaluate, "evaluate", fail)
    ended = cli("ssl-eval", f"run={tmp_path / 'sweep'}", "protocol=knn")
    assert ended.code == 3
    assert [line[:16] for line in ended.err.splitlines()] == ["ssl-eval: the di", "ssl-eval: damage"]


def test_temporary_files_of_killed_evaluations_are_removed(trained: Path, cli: Cli) -> None:
    features = trained / "eval/features"
    features.mkdir(parents=True)
    ended = subprocess.Popen(["true"])
    ended.wait()
    names = [f"trained.pt.{atomic.machine()}-{ended.pid}-00000000.tmp", ".trained.pt.12.part"]
    for name in names:
        (features / name).write_bytes(b"half")
        os.utime(features / name, (1.0, 1.0))
    assert cli("ssl-eval", f"run={trained}", "protocol=knn", "baselines=false", "cache=false").code == 0
    assert list(features.iterdir()) == []


def test_damaged_files_of_an_evaluation_are_set_aside_and_made_again(trained: Path, cli: Cli) -> None:
    line = ["ssl-eval", f"run={trained}", "protocol=knn"]
    assert cli(*line).code == 0
    wanted = result(trained / "eval", "knn")
    caches = sorted((trained / "eval/features").iterdir())
    assert {path.suffix for path in caches} == {".pt", ".json"}
    for path in caches:
        path.write_bytes(b"{}")
    ended = cli(*line)
    assert (ended.code, ended.err) == (0, "")
    for path in caches:
        assert f"{path} is damaged (" in ended.out
        assert path.with_name(f"{path.name}.damaged").read_bytes() == b"{}"
    found = result(trained / "eval", "knn")
    assert found | {"seconds": 0} == wanted | {"seconds": 0}
    assert cli(*line).out.count("is damaged") == 0


PROTOCOL = """
from sslcli.evaluation.base import FeatureProtocol

class Failing(FeatureProtocol):
    def __init__(self, error: str) -> None:
        self.error = error

    def measure(self, features, *, on_progress=None):
        raise getattr(__import__("builtins"), self.error)("the reason")
"""


def test_an_exception_of_a_protocol_is_reported_with_its_traceback(trained: Path, cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "failing_protocol.py").write_text(PROTOCOL)
    (tmp_path / "conf/protocol").mkdir(parents=True)
    (tmp_path / "conf/protocol/failing.yaml").write_text("_target_: failing_protocol.Failing\nerror: KeyError\n")
    line = [f"run={trained}", "--config-dir", "conf", "protocol=failing", "trust=[failing_protocol]"]
    ended = cli("ssl-eval", *line)
    assert ended.code == 2
    first, *lines = ended.err.splitlines()
    assert first == "ssl-eval: failing_protocol.Failing failed while evaluating (KeyError: 'the reason')"
    assert lines[0] == "Traceback (most recent call last):"
    assert "failing_protocol.py" in ended.err
    assert lines[-1] == "KeyError: 'the reason'"
    ended = cli("ssl-eval", *line, "protocol.error=ValueError")
    assert ended.code == 2
    assert ended.err == "ssl-eval: the reason (SSLCLI_DEBUG=1 shows the traceback)\n"


def test_a_run_without_a_readable_configuration_does_not_stop_changes_of_the_dataset(
    trained: Path, cli: Cli, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        shutil.copytree(trained, tmp_path / "sweep" / name, symlinks=True)
    (tmp_path / "sweep/a/config.yaml").unlink()
    os.mkfifo(tmp_path / "sweep/a/config.yaml")
    ended = cli("ssl-eval", f"run={tmp_path / 'sweep'}", "protocol=knn", "baselines=false", "dataset.limit=150")
    assert ended.code == 2
    assert ended.err.count("\n") == 1
    assert "config.yaml is a FIFO" in ended.err
    assert "1 of 2 runs could not be evaluated" in ended.out
