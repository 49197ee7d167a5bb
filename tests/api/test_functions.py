"""`sslcli.train` and `sslcli.evaluate`: the bits of the commands, errors as exceptions, no changes of the process."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hydra
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

import sslcli
from command_line import SMALL, Cli
from small_runs import differences, newest
from sslcli.data import worker_server
from sslcli.distributed import devices
from sslcli.errors import ConfigError, Stopped, TrainingFailed

LINE = [*SMALL, "monitor.knn_k=10"]  # as the fixture run_dir


def settings() -> list[object]:
    """Global settings of this process that a run may change."""
    return [
        [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)],
        [sys.argv, list(sys.path), dict(os.environ), threading.excepthook],
        [torch.get_num_threads(), torch.get_deterministic_debug_mode(), torch.backends.cudnn.benchmark],
        [torch.random.get_rng_state().tolist(), torch.get_float32_matmul_precision()],
        [GlobalHydra.instance().hydra, OmegaConf.has_resolver("mine"), torch.is_grad_enabled()],
    ]


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> sslcli.TrainingResult:
    """The result of a run in this process, between two compositions with Hydra."""
    folder = tmp_path_factory.mktemp("python")
    (folder / "own.yaml").write_text("key: ${mine:3}\n")
    OmegaConf.register_new_resolver("mine", lambda value: int(value) + 1)
    with hydra.initialize_config_dir(str(folder), version_base="1.3"):
        before = settings()
        found = sslcli.train([*LINE, f"run_dir={folder}/run"])
        assert settings() == before
        assert hydra.compose("own").key == 4
    OmegaConf.clear_resolver("mine")
    return found


def test_training_ends_with_the_bits_of_the_command(result: sslcli.TrainingResult, run_dir: Path) -> None:
    assert differences(newest(result.run_dir), newest(run_dir)) == []
    assert (result.step, result.checkpoint.name) == (3, "step-00000003.pt")
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert result.metrics["train/loss"] == lines[-1]["train/loss"]
    assert result.metrics["monitor/knn_top1"] == lines[-1]["monitor/knn_top1"]


def test_evaluations_write_the_result_of_the_command(result: sslcli.TrainingResult, cli: Cli) -> None:
    before = settings()
    line = [f"run={result.run_dir}", "protocol=knn_full", "protocol.k=5"]
    found = sslcli.evaluate(line)
    assert settings() == before
    (path,) = found.results_dir.glob("knn_full*.json")
    written = json.loads(path.read_text())
    assert cli("ssl-eval", *line).code == 0
    assert json.loads(path.read_text()) | {"seconds": 0} == written | {"seconds": 0}
    assert (found.top1, list(found.interval or ())) == (written["top1"], written["interval"])
    assert (found.protocol, found.split, set(found.baselines)) == ("knn_full", "test", {"pixels", "random"})
    assert json.loads(json.dumps(found.content)) == written


def test_a_finished_run_is_returned_at_once_and_a_longer_one_is_extended(result: sslcli.TrainingResult) -> None:
    line = [*LINE, f"run_dir={result.run_dir}"]
    time = result.checkpoint.stat().st_mtime_ns
    assert sslcli.train(line) == result
    assert result.checkpoint.stat().st_mtime_ns == time


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method=mocoo"], "mocoo"),
        (["train.epochz=3"], "Did you mean 'epochs'"),
        (["train.batch_size=0"], "train.batch_size is 0"),
        (["launcher=multi"], "use the command ssl-train"),
        (["dry_run=true"], "dry_run is true"),
        (["--multirun", "seed=1,2"], "the flag --multirun works only"),
        (["--help"], "the flag --help works only"),
        (["--nonesuch"], "there is no flag"),
        ("seed=1", "must be a list of strings"),
        (["dataset=flat", "dataset.root=/none"], "/none"),
    ],
)
def test_wrong_settings_are_raised(
    overrides: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    before = settings()
    with pytest.raises(ConfigError, match=message):
        sslcli.train(overrides if isinstance(overrides, str) else [*overrides, f"run_dir={tmp_path}/run"])
    assert settings() == before
    assert capsys.readouterr().err == ""


def test_failed_and_stopped_runs_raise_and_can_be_called_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = [*SMALL, "backbone.width=4", "monitor.knn_every_epochs=0", f"run_dir={tmp_path}/run"]
    with pytest.raises(TrainingFailed, match="loss"):
        sslcli.train([*line, "optimizer.lr=1e30"])
    line[-1] += "2"
    with pytest.raises(Stopped, match="time limit"):
        sslcli.train([*line, "train.max_time=0.001s"])
    last = sslcli.train(line).checkpoint  # the lock of the stopped run was released
    assert last.name == "step-00000003.pt"
    shutil.rmtree(last.parent)
    with pytest.raises(ConfigError, match="its checkpoints were deleted"):
        sslcli.train(line)
    with ThreadPoolExecutor() as pool, pytest.raises(ConfigError, match="main thread"):
        pool.submit(sslcli.train, line).result()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(ConfigError, match=r"RANK|this process alone"):
        sslcli.train(line)


def test_the_server_of_data_workers_starts_before_cuda_is_initialized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def reads_random_state(device: torch.device) -> None:  # this initializes CUDA
        calls.append("random state")
        raise InterruptedError

    monkeypatch.setattr(worker_server, "start", lambda device: calls.append("server"))
    monkeypatch.setattr(devices, "unchanged_random_state", reads_random_state)
    with pytest.raises(InterruptedError):
        sslcli.train([*LINE, f"run_dir={tmp_path}/run"])
    (tmp_path / "config.yaml").touch()  # so that the folder is a run
    with pytest.raises(InterruptedError):
        sslcli.embed(tmp_path, tmp_path)
    assert calls == ["server", "random state"] * 2


def test_evaluations_of_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give run=DIR"):
        sslcli.evaluate([])
    with pytest.raises(ConfigError, match=r"has no config\.yaml"):
        sslcli.evaluate([f"weights=run:{tmp_path}"])
    with pytest.raises(ConfigError, match="there is no such path"):
        sslcli.evaluate(["run=/nonesuch"])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_modules_with_the_old_names_of_the_functions_can_be_imported() -> None:
    for name in ("train", "evaluate"):
        function = getattr(sslcli, name)
        assert importlib.import_module(f"sslcli.{name}").__name__.startswith("sslcli.e")
        assert getattr(sslcli, name) is function
