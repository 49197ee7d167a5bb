"""Evaluations on several processes, with the numbers of one process."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from command_line import Cli, composed, installed
from processes import Pair
from small_runs import family, survivors
from sslcli.config.run_config import EvalConfig
from sslcli.distributed import collectives
from sslcli.errors import ConfigError
from sslcli.evaluation.base import FeatureProtocol, Protocol
from sslcli.evaluation.finetune import Finetune
from sslcli.report.console import Screen
from sslcli.runs import evaluate

TRAIN = ["dataset.train_images=150", "dataset.test_images=30", "backbone.width=4", "train.batch_size=45"]
TRAIN += ["train.max_steps=3", "monitor.pictures=0", "launcher.threads=1"]
FEW = ["protocol.steps=4", "protocol.batch_size=16"]
PROTOCOLS = {
    "knn": ["protocol.k=5"],
    "knn_full": [],
    "linear": ["protocol.epochs=2"],
    "linear_sgd": ["protocol.epochs=5", "protocol.batch_size=50"],
    "attentive": ["protocol.epochs=2", "protocol.batch_size=50", "protocol.lrs=[0.1,0.01]"],
    "finetune": FEW,
    "semi": [*FEW, "protocol.labels_per_class=2", "protocol.seeds=3", "protocol.warm_start=true"],
    "utility": [*FEW, "protocol.smallest=40", "protocol.points=2", "protocol.seeds=2"],
    "distill": FEW,
}
CROPS = ["protocol.flip=0.5", *PROTOCOLS["attentive"]]  # the tokens are computed in every step
OF_THIS_EVALUATION = ("seconds", "run", "checkpoint", "net", "teacher")  # times and paths


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated")
    installed(folder, "ssl-train", *TRAIN, "run_dir=run")
    return folder / "run"


def evaluated(run_dir: Path, *overrides: str) -> dict[str, Any]:
    config = EvalConfig.from_plain(composed("eval", f"run={run_dir}", "batch_size=32", *overrides))
    return evaluate.evaluate(config, torch.device("cpu"), Screen(silent=True))


def numbers(result: dict[str, Any]) -> dict[str, Any]:
    found = {key: value for key, value in result.items() if key not in OF_THIS_EVALUATION}
    return found | {"teacher": {k: v for k, v in result.get("teacher", {}).items() if "top" in k}}


def test_every_protocol_has_the_numbers_of_one_process(run_dir: Path, tmp_path: Path, pair: Pair) -> None:
    one, two = (Path(shutil.copytree(run_dir, tmp_path / name)) for name in ("one", "two"))
    for name, overrides in (*PROTOCOLS.items(), ("attentive", CROPS)):
        expected = evaluated(one, f"protocol={name}", *overrides)
        found, nothing = pair.run(evaluated, two, f"protocol={name}", *overrides)
        assert nothing == {}
        found["results_dir"] = expected["results_dir"]
        assert numbers(found) == numbers(expected), name
        assert found["baselines"] == expected["baselines"]
    files = {path.relative_to(one) for path in one.rglob("eval/**/*")}
    assert {path.relative_to(two) for path in two.rglob("eval/**/*")} == files
    again, _ = pair.run(evaluated, two, "protocol=linear", *PROTOCOLS["linear"])
    assert numbers(again) == numbers(
        json.loads((two / "eval/linear.json").read_text()) | {"results_dir": str(two / "eval")}
    )


class Alone(FeatureProtocol):
    """Knows nothing of other processes, and reports the number of processes that it sees."""

    def measure(self, features: Any, *, on_progress: Any = None) -> dict[str, Any]:
        seen = collectives.world_size() / 10
        split, x, _ = features.reported()
        return {"protocol": "alone", "split": split, "top1": seen, "interval": [0, 1], "n_train": 1, "n_test": len(x)}


class Failing(Alone):
    def measure(self, features: Any, *, on_progress: Any = None) -> dict[str, Any]:
        raise ConfigError("no number today")


class Inherited(Finetune):
    """Inherits from a protocol that shares its work, and reports the number of processes that it sees."""

    def __call__(self, starts: Any, task: Any) -> Any:
        outcome = super().__call__(starts, task)
        outcome.result["processes"] = collectives.world_size()
        return outcome


def own_protocol(run_dir: Path, kind: Callable[[], Protocol]) -> Any:
    with patch.object(evaluate, "build_protocol", lambda config, subject: ({"_target_": "Own"}, kind())):
        try:
            found = evaluated(run_dir, "cache=false")
        except ConfigError as error:
            return str(error)
    return {key: found[key] for key in found if key in ("top1", "baselines", "processes")}


def test_a_protocol_that_knows_nothing_of_processes_runs_on_rank_0(run_dir: Path, pair: Pair) -> None:
    baseline = {"top1": 0.1, "interval": [0, 1]}
    expected = {"top1": 0.1, "baselines": {"pixels": baseline, "random": baseline}}
    assert pair.run(own_protocol, run_dir, Alone) == [expected, {}]
    assert pair.run(own_protocol, run_dir, Failing) == ["no number today"] * 2
    found, nothing = pair.run(own_protocol, run_dir, partial(Inherited, steps=2, batch_size=16))
    assert (found["processes"], nothing) == (1, {})


def test_the_installed_command_starts_processes_and_prints_once(run_dir: Path, tmp_path: Path) -> None:
    one, two = (Path(shutil.copytree(run_dir, tmp_path / name)) for name in ("one", "two"))
    installed(tmp_path, "ssl-eval", f"run={one}", "protocol=knn", "launcher.threads=1")
    output = installed(tmp_path, "ssl-eval", f"run={two}", "protocol=knn", "launcher=multi", "launcher.processes=2")
    assert output.count("results: ") == 1
    assert output.count("│ knn (val)") == 1
    results = [json.loads((path / "eval/knn.json").read_text()) for path in (one, two)]
    assert numbers(results[0]) == numbers(results[1])
    wrong = installed(tmp_path, "ssl-eval", f"run={two}", "launcher=multi", "launcher.processes=0", code=2)
    assert "launcher.processes is 0, but it must be at least 1" in wrong
    wrong = installed(tmp_path, "ssl-eval", f"run={two}", "protocol=semi", "protocol.labels_per_class=500",
        "launcher=multi", "launcher.processes=2", code=2)  # fmt: skip
    assert wrong.count("ssl-eval: labels_per_class is 500") == 1


def test_torchrun_starts_the_processes_and_a_folder_of_runs_becomes_one_table(run_dir: Path, tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        shutil.copytree(run_dir, tmp_path / "runs" / name)
    (tmp_path / "runs/b/config.yaml").write_text("seed: [")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    ended = subprocess.run(
        [*command, "-m", "sslcli.cli.eval", "run=runs", "protocol=linear", "protocol.epochs=1"],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ended.returncode == 1  # torchrun's own code
    assert "exitcode  : 2" in ended.stderr
    assert ended.stdout.count("1 of 3 runs could not be evaluated") == 1
    assert ended.stderr.count("ssl-eval: ") == 1
    found = [json.loads((tmp_path / "runs" / name / "eval/linear.json").read_text()) for name in ("a", "c")]
    assert found[0]["top1"] == found[1]["top1"]


def test_an_error_that_the_other_processes_do_not_know_ends_the_evaluation_of_a_folder(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EvalConfig.from_plain(composed("eval", f"run={run_dir.parent}"))

    def fail(*arguments: object) -> dict[str, Any]:
        raise ConfigError("a file is missing here")

    def of_folder() -> int:
        return evaluate._evaluate_folder(run_dir.parent, config, torch.device("cpu"), Screen(silent=True))

    with patch.object(evaluate, "evaluate", fail):
        assert of_folder() == 2
        monkeypatch.setattr(collectives, "world_size", lambda: 2)
        monkeypatch.setattr(collectives, "rank", lambda: 1)
        with pytest.raises(ConfigError, match="a file is missing"):
            of_folder()


def test_another_number_of_processes_than_torchruns_is_refused(
    run_dir: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")
    ended = cli("ssl-eval", f"run={run_dir}", "launcher=multi", "launcher.processes=3")
    assert ended.code == 2
    assert "launcher.processes is 3, but the environment variable RANK is '0'" in ended.err


LONG = ["protocol=finetune", "protocol.steps=100000", "launcher=multi", "launcher.processes=2"]


def started(run_dir: Path, log: Path, *overrides: str) -> tuple[subprocess.Popen[bytes], list[int]]:
    """Start a long evaluation on two processes; return it, and the ids of its ranks once they train."""
    command = [str(Path(sys.executable).with_name("ssl-eval")), f"run={run_dir}", *LONG, *overrides]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True
        )
    until = time.monotonic() + 120
    while "fine-tuning " not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < until, log.read_text()
        time.sleep(0.1)
    ranks = [pid for pid in family(process.pid) if b"evaluate_launch" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(ranks) == 2
    return process, ranks


def test_sigterm_ends_all_processes(run_dir: Path, tmp_path: Path) -> None:
    copy, log = Path(shutil.copytree(run_dir, tmp_path / "run")), tmp_path / "log"
    process, ranks = started(copy, log)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
    assert log.read_text().count("ssl-eval: stopped by a signal; complete features are cached") == 1
    assert not survivors(ranks, within=20)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_command_with_its_name(run_dir: Path, tmp_path: Path, victim: int) -> None:
    copy, log = Path(shutil.copytree(run_dir, tmp_path / "run")), tmp_path / "log"
    process, ranks = started(copy, log, "launcher.max_restarts=0")
    os.kill(sorted(ranks)[victim], signal.SIGKILL)
    assert process.wait(60) == 3
    assert log.read_text().count("ssl-eval: ") == 1
    assert f"ssl-eval: process {victim} was ended by SIGKILL" in log.read_text()
    assert not survivors(ranks, within=20)
