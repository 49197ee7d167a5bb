from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from command_line import SMALL, Cli, Ended, installed
from gpu_device import chosen
from processes import Pair
from small_sweeps import JOB
from sslcli.cli import embed as ssl_embed
from sslcli.cli import eval as ssl_eval
from sslcli.cli import export as ssl_export
from sslcli.cli import train as ssl_train

MAINS = {
    "ssl-train": ssl_train.main,
    "ssl-eval": ssl_eval.main,
    "ssl-embed": ssl_embed.main,
    "ssl-export": ssl_export.main,
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        choices=("cuda", "cpu"),
        default=os.environ.get("SSLCLI_TEST_DEVICE"),
        help="run all GPU tests (tests/gpu) on this device; by default, a part of them runs on the CPU",
    )


def pytest_configure(config: pytest.Config) -> None:
    if chosen(config) != "cuda":
        return
    if not torch.cuda.is_available():
        pytest.exit("there is no CUDA device: run the GPU tests on a machine with a GPU, or with --device cpu", 2)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read only once, before the first matrix product


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Use one thread in each test: tensors of tests are small, and idle threads slow a busy machine down.

    A command that a test calls in this process sets the number of threads. If a later test forks, OpenMP waits forever
    in the forked process for threads that only this process has.
    """
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Seed every test, so that its random numbers do not depend on the tests before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _forget_modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Forget the modules that a test wrote and imported, so that a later test can write one of the same name."""
    before = set(sys.modules)
    yield
    written = tmp_path_factory.getbasetemp()
    for name in set(sys.modules) - before:
        file = getattr(sys.modules[name], "__file__", None)
        if file is not None and Path(file).is_relative_to(written):
            del sys.modules[name]


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Two processes of a gloo group: `pair.run(function, *args)` returns the results by rank."""
    pair = Pair(tmp_path_factory.mktemp("pair"))
    yield pair
    pair.stop()


@pytest.fixture(scope="session")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """As `pair`, with four processes."""
    four = Pair(tmp_path_factory.mktemp("four"), size=4)
    yield four
    four.stop()


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Cli]:
    """Call commands in this process, in an empty folder; changes of the process are undone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def call(program: str, *arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", [f"/somewhere/{program}", *arguments])
        with pytest.raises(SystemExit) as ended:
            MAINS[program]()
        out, err = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return Ended(ended.value.code, out, err)

    yield call
    torch.set_deterministic_debug_mode("default")


@pytest.fixture
def quick_jobs(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the jobs of sweeps by scripts that do not train."""
    path = tmp_path_factory.mktemp("job") / "job.py"
    path.write_text(JOB)
    monkeypatch.setattr("sslcli.sweeps.sweep.program_of", lambda command: (sys.executable, "-S", str(path)))


@pytest.fixture(scope="session")
def work_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the run of `run_dir` was started in."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="session")
def run_dir(work_dir: Path) -> Path:
    """A finished run of the installed command, in its default directory. Tests must not modify it."""
    installed(work_dir, "ssl-train", *SMALL, "monitor.knn_k=10")
    (found,) = (work_dir / "runs").iterdir()
    return found


@pytest.fixture
def trained(run_dir: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to evaluate, export or change. It has no results of other tests."""
    ignored = shutil.ignore_patterns("eval")
    return Path(shutil.copytree(run_dir, tmp_path / "trained", symlinks=True, ignore=ignored))


@pytest.fixture
def restored_signals() -> Iterator[None]:
    """Restores the handlers that torch's agent replaces; in a command, the process ends with the agent."""
    before = {
        number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    }
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
