"""One process of a training run."""

from __future__ import annotations

import gc
import json
import os
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from command_line import SMALL, Cli, Ended, composed
from small_runs import complete, start_ranks, start_warm
from sslcli.config.run_config import RunConfig
from sslcli.distributed import devices
from sslcli.engine.run import Run
from sslcli.errors import ConfigError, Stopped
from sslcli.runs import directory
from sslcli.runs.worker import acquire_lock, lock_patience, outcome, request_requeue

QUICK = [*SMALL, "monitor.knn_every_epochs=0", "monitor.health_every_steps=0", "monitor.pictures=0"]


def test_resume_never_and_must_are_obeyed(run_dir: Path, cli: Cli, tmp_path: Path) -> None:
    ended = cli("ssl-train", *SMALL, "monitor.knn_k=10", f"run_dir={run_dir}", "resume=never")
    assert ended.code == 2
    assert "resume is 'never'" in ended.err
    ended = cli("ssl-train", *QUICK, "run_dir=new", "resume=must")
    assert ended.code == 2
    assert "contains no checkpoint" in ended.err
    assert not (tmp_path / "new").exists()
    ended = cli("ssl-train", *SMALL, "monitor.knn_k=10", f"run_dir={run_dir}", "resume=must")
    assert (ended.code, ended.err) == (0, "")


def test_the_kind_of_kernels_is_shown_and_recorded(cli: Cli, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    line = [*QUICK, f"run_dir={run_dir}"]
    ended = cli("ssl-train", *line, "train.max_steps=1", "train.deterministic=false")
    assert (ended.code, ended.err) == (0, "")
    assert re.search(r"deterministic kernels +off: resuming is not bit-exact", ended.out)
    assert re.search(r"torch.compile +off: train.compile=auto does not compile on cpu", ended.out)
    assert directory.read_config(run_dir)["effective"]["deterministic kernels"].startswith("off")
    found = json.loads((run_dir / "environment.json").read_text())["latest"]
    assert (found["deterministic_kernels"], found["compiled"]) == (False, False)
    ended = cli("ssl-train", *line, "train.max_steps=2")  # keeps the stored value
    assert (ended.code, ended.err) == (0, "")
    assert re.search(r"deterministic kernels +off", ended.out)
    ended = cli("ssl-train", *line, "train.max_steps=3", "train.deterministic=true")
    assert (ended.code, "train.deterministic: False -> True" in ended.err) == (2, True)


def test_a_run_on_a_gpu_is_not_exact_where_its_kernels_change(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = [*QUICK, f"run_dir={tmp_path / 'run'}"]
    monkeypatch.setattr(devices, "uses_deterministic_kernels", lambda setting, device: False)
    assert cli("ssl-train", *line, "train.max_steps=1").code == 0
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    ended = cli("ssl-train", *line, "train.max_steps=2")
    assert (ended.code, ended.err) == (0, "")
    assert "results will not be bit-identical: deterministic kernels False -> True" in " ".join(ended.out.split())


def test_a_start_that_is_refused_writes_no_configuration(trained: Path, cli: Cli) -> None:
    (trained / "config.yaml").unlink()
    (trained / "done").unlink()
    ended = cli("ssl-train", *SMALL, "monitor.knn_k=10", "seed=9", f"run_dir={trained}")
    assert ended.code == 2
    assert "is the checkpoint of a run with another configuration; what differs: seed: 0 -> 9" in ended.err
    assert not (trained / "config.yaml").exists()
    ended = cli("ssl-train", *SMALL, "monitor.knn_k=10", f"run_dir={trained}")
    assert (ended.code, ended.err) == (0, "")
    assert directory.read_config(trained)["seed"] == 0


def test_an_extension_that_is_refused_leaves_the_run_finished(trained: Path, cli: Cli) -> None:
    for path in (trained / "checkpoints").glob("step-*.pt"):
        path.write_bytes(b"")
    before = (trained / "config.yaml").read_bytes()
    ended = cli("ssl-train", *SMALL, "monitor.knn_k=10", "train.max_steps=9", f"run_dir={trained}")
    assert ended.code == 2
    assert "can be used" in ended.err
    assert (trained / "config.yaml").read_bytes() == before
    assert (trained / "done").exists()


def note_garbage_collection(report: Path) -> None:
    """Write whether garbage collection is on when training starts, and the numbers of tracked and frozen objects."""
    from sslcli.runs import worker

    train = worker.train

    def noted(job: Run, step: int) -> None:
        report.write_text(json.dumps([gc.isenabled(), len(gc.get_objects()), gc.get_freeze_count()]))
        train(job, step)

    worker.train = noted


def test_training_looks_for_garbage_but_not_among_what_was_imported(tmp_path: Path) -> None:
    report, log = tmp_path / "report", tmp_path / "log"
    arguments = [*QUICK, "train.max_steps=1", f"run_dir={tmp_path / 'run'}"]
    complete(start_warm(*arguments, log=log, prepare=note_garbage_collection, given=report), log)
    collects, watched, frozen = json.loads(report.read_text())
    assert collects
    assert frozen > 100_000 > 10_000 > watched


def test_only_a_requeued_job_waits_for_the_run_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    config = RunConfig.from_plain(composed("train", "launcher.timeout=5m"))
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    assert lock_patience(config) == 0
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    assert lock_patience(config) == 0
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert lock_patience(config) == 360


def test_a_locked_run_directory_is_waited_for_so_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []

    def lock(run_dir: Path) -> str:
        tries.append(time.monotonic())
        if len(tries) < 3:
            raise ConfigError("another run")
        return "the lock"

    monkeypatch.setattr(directory, "lock", lock)
    assert acquire_lock(tmp_path, patience=60) == "the lock"
    tries.clear()
    with pytest.raises(ConfigError, match="another run"):
        acquire_lock(tmp_path, patience=-1)
    assert len(tries) == 1


def test_a_stopped_run_asks_to_be_requeued_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "slurm").mkdir()
    request_requeue(tmp_path, Stopped("stopped by SIGUSR1 at step 5; run again to resume", by_signal=True))
    assert (tmp_path / "slurm" / "want_requeue").read_text() == "stopped by SIGUSR1 at step 5"
    assert os.listdir(tmp_path / "slurm") == ["want_requeue"]


def test_the_last_line_has_the_newest_loss_and_accuracy(tmp_path: Path) -> None:
    assert outcome(tmp_path) == ""
    lines = [{"step": 1, "train/loss": 4.0, "monitor/knn_top1": 0.125}, {"step": 2, "train/loss": 3.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert "3.5" in outcome(tmp_path)
    assert "12.5 %" in outcome(tmp_path)


NETWORKS = """
import torch
from torch import nn

class WithHead(nn.Module):
    num_features = 8

    def __init__(self, in_channels: int = 3) -> None:
        super().__init__()
        self.conv, self.fc, self.calls = nn.Conv2d(3, 8, 3, 2), nn.Linear(8, 10), 0

    def forward(self, images):
        return self.conv(images).relu().mean((2, 3))

class Sometimes(WithHead):
    def forward(self, images):
        self.calls += 1
        features = super().forward(images)
        return features + (self.fc(features).sum() if self.calls % 7 < 4 else 0)
"""


def enter(folder: Path, rank: int) -> None:
    os.chdir(folder)


def test_unused_parameters_end_no_run_of_two_processes(tmp_path: Path) -> None:
    """Parameters that no step uses are frozen; parameters that only some steps use are an error of one line."""
    (tmp_path / "networks_of_mine.py").write_text(NETWORKS)
    (tmp_path / "conf/backbone").mkdir(parents=True)
    for name, code in (("WithHead", 0), ("Sometimes", 2)):
        (tmp_path / f"conf/backbone/{name}.yaml").write_text(f"_target_: networks_of_mine.{name}\n")
        log = tmp_path / name
        arguments = [*QUICK, "train.max_steps=20", "--config-dir", "conf", "trust=[networks_of_mine]"]
        arguments += [f"backbone={name}", f"run_dir=run_{name}"]
        ranks = start_ranks(*arguments, log=log, prepare=partial(enter, tmp_path))
        codes, text = [rank.finish() for rank in ranks], log.read_text()
        assert codes == [code, code], text
        assert "Traceback" not in text
        if code == 0:
            assert text.count("does not depend on 2 trainable parameters") == 1
            assert "backbone.fc.weight, backbone.fc.bias" in text
        else:
            assert "a step used only some of the trainable parameters" in text


METHODS = """
import torch
from sslcli.methods.simclr import SimCLR

class Failing(SimCLR):
    steps = 0

    def after_step(self, progress):
        self.steps += 1
        if self.steps == 3:
            raise KeyError("three")

class LostProcess(Failing):
    def after_step(self, progress):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

class Described(Failing):
    def effective(self, batch_size):
        return {"one": 1 / 0}

class Lookahead(torch.optim.SGD):
    def step(self, closure=None):
        return self.state["slow"]["weights"]
"""


@pytest.fixture
def with_methods(cli: Cli, tmp_path: Path) -> Callable[..., Ended]:
    """Return a function that runs ssl-train with the module `methods_that_fail` in the working directory."""
    (tmp_path / "methods_that_fail.py").write_text(METHODS)
    return partial(cli, "ssl-train", *SMALL, "method=simclr", "trust=[methods_that_fail]", "run_dir=run")


def test_an_exception_in_a_step_is_reported_with_the_traceback_of_that_code(
    with_methods: Callable[..., Ended], tmp_path: Path
) -> None:
    ended = with_methods("method._target_=methods_that_fail.Failing")
    assert ended.code == 2
    first, *lines = ended.err.splitlines()
    assert first == "ssl-train: methods_that_fail.Failing failed while training (KeyError: 'three')"
    assert lines[0] == "Traceback (most recent call last):"
    assert "methods_that_fail.py" in lines[1]
    assert lines[-1] == "KeyError: 'three'"
    assert "sslcli/" not in ended.err
    assert 'raise KeyError("three")' in (tmp_path / "run/console.log").read_text()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("method._target_=methods_that_fail.Described", "Described failed while preparing the run (ZeroDivisionError"),
        ("optimizer._target_=methods_that_fail.Lookahead", "Lookahead failed while training (KeyError: 'weights')"),
    ],
)
def test_an_exception_before_the_first_step_or_in_an_optimizer_is_reported_too(
    line: str, expected: str, with_methods: Callable[..., Ended]
) -> None:
    ended = with_methods(line)
    assert ended.code == 2, ended.err
    assert ended.err.startswith(f"ssl-train: methods_that_fail.{expected}")
    assert ended.err.count("Traceback") == 1


def test_the_end_of_a_data_worker_in_user_code_is_not_an_error_of_that_code(
    with_methods: Callable[..., Ended],
) -> None:
    ended = with_methods("method._target_=methods_that_fail.LostProcess")
    assert ended.code == 3
    assert ended.err.startswith("ssl-train: a data worker died (DataLoader worker (pid 7) is killed")


def test_a_method_without_embeddings_starts_with_a_warning(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "silent_method.py").write_text(
        "from sslcli.methods.simclr import SimCLR\n"
        "class Silent(SimCLR):\n"
        "    embeddings = property(lambda self: (), lambda self, value: None)\n"
    )
    line = [*SMALL, "method=simclr", "method._target_=silent_method.Silent", "trust=[silent_method]"]
    ended = cli("ssl-train", *line)
    assert ended.code == 0, ended.err
    assert "collapse is not detected, because forward of silent_method.Silent" in " ".join(ended.out.split())
    ended = cli("ssl-train", *line, "monitor.on_collapse=ignore", "name=other")
    assert ended.code == 0, ended.err
    assert "collapse" not in ended.out
