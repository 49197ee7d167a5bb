"""Data workers that start after CUDA was initialized are forked from a process without it."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from multiprocessing import resource_sharer
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from command_line import Cli
from small_runs import make_folder, survivors
from sslcli.data import worker_server
from sslcli.data.batch_slots import PackedBatch
from sslcli.data.num_workers import BatchMemory
from sslcli.data.sources.base import Source
from sslcli.data.worker_server import WorkerServer
from sslcli.data.workers import iterate_batches
from sslcli.distributed import devices
from sslcli.errors import ConfigError, ProcessLost

pytestmark = pytest.mark.skipif(not Path("/proc").exists(), reason="the server exists only on Linux")
LARGE = 100_000  # values; a tensor that is not copied out of its slot


class Parents(Dataset[dict[str, Tensor]]):
    """Returns the parents of its worker."""

    def __getitem__(self, item: int) -> dict[str, Tensor]:
        if item == 13:
            raise ConfigError("image 13 is missing")
        if item == 14:
            os.kill(os.getpid(), signal.SIGKILL)
        return {"parent": torch.tensor(os.getppid()), "image": torch.full((LARGE,), item, dtype=torch.uint8)}


class Unpicklable(Parents):
    def __init__(self) -> None:
        self.transform = lambda value: value


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WorkerServer]:
    """A server of this process, in which CUDA appears to be initialized afterwards."""
    monkeypatch.setattr(worker_server, "_server", None)
    with open(os.devnull) as shared:  # starts a thread of this process, which sends files to other processes
        resource_sharer.DupFd(shared.fileno())
    worker_server.start(torch.device("cuda", 0))
    found = worker_server._server
    assert found is not None
    assert worker_server.current() is None  # CUDA is not initialized yet
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    yield found
    found.close()


def batches(dataset: Dataset[Any], items: range, **options: Any) -> list[dict[str, Tensor]]:
    return list(iterate_batches(dataset, items, 2, owner=Source, timeout=60, **options))


def test_workers_are_forked_from_the_server(server: WorkerServer, monkeypatch: pytest.MonkeyPatch) -> None:
    slots: list[int] = []
    unpack = PackedBatch.unpack
    monkeypatch.setattr(PackedBatch, "unpack", lambda batch: (slots.append(batch.slot), unpack(batch))[1])
    for _ in range(2):  # every split of a k-NN evaluation starts workers
        found = batches(Parents(), range(12), memory=BatchMemory(1, LARGE))
        assert {int(batch["parent"]) for batch in found} == {server.pid}
        assert [batch["image"].unique().tolist() for batch in found] == [[item] for item in range(12)]
    assert slots
    assert {int(batch["parent"]) for batch in batches(Parents(), range(2))} == {server.pid}  # without slots


def test_errors_of_workers_arrive(server: WorkerServer) -> None:
    with pytest.raises(ConfigError, match="image 13 is missing"):
        batches(Parents(), range(10, 14))
    with pytest.raises(ProcessLost, match="a data worker died"):
        batches(Parents(), range(14, 15))


@pytest.mark.parametrize("lost", [False, True])
def test_this_process_forks_workers_if_the_server_cannot(server: WorkerServer, lost: bool) -> None:
    if lost:
        os.kill(server.pid, signal.SIGKILL)
    found = batches(Parents() if lost else Unpicklable(), range(2), memory=BatchMemory(1, LARGE))
    assert {int(batch["parent"]) for batch in found} == {os.getpid()}


def test_after_an_interrupted_request_this_process_forks_workers(
    server: WorkerServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: object) -> bytes:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(worker_server, "receive", interrupt)
        with pytest.raises(KeyboardInterrupt):
            batches(Parents(), range(2))
    assert {int(batch["parent"]) for batch in batches(Parents(), range(2))} == {os.getpid()}


def test_the_server_starts_only_before_cuda_and_only_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_server, "_server", None)
    worker_server.start(torch.device("cpu"))
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    worker_server.start(torch.device("cuda", 0))
    assert worker_server.current() is None


def test_the_server_and_its_workers_end_with_the_run(server: WorkerServer) -> None:
    iterator = iterate_batches(Parents(), range(100), 2, owner=Source, timeout=60)
    next(iterator)
    children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
    assert len(children) == 2
    iterator.close()
    assert not survivors([int(pid) for pid in children], within=20)


def test_a_run_and_an_evaluation_fork_no_worker_after_cuda_was_initialized(
    tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU, with the server of a GPU, and CUDA that appears to be initialized from `devices.prepare` on."""
    initialized: list[bool] = []
    prepare, start, store = devices.prepare, worker_server.start, WorkerServer.store
    stored: list[str] = []

    def prepared(*arguments: Any, **options: Any) -> None:
        prepare(*arguments, **options)
        initialized.append(True)

    def record(server: WorkerServer, dataset: Any, *arguments: Any) -> Any:
        stored.append(type(dataset.dataset).__name__)
        return store(server, dataset, *arguments)

    def fork(process: Any) -> None:
        raise AssertionError("a worker was forked from the process with CUDA")

    monkeypatch.setattr(worker_server, "_server", None)
    monkeypatch.setattr(worker_server, "_is_initialized", lambda: bool(initialized))
    monkeypatch.setattr(worker_server, "start", lambda device: start(torch.device("cuda", 0)))
    monkeypatch.setattr(devices, "prepare", prepared)
    monkeypatch.setattr(WorkerServer, "store", record)
    monkeypatch.setattr("multiprocessing.context.ForkProcess._Popen", staticmethod(fork))
    images = make_folder(tmp_path / "images", per_class=24, broken=0)
    line = [f"dataset.root={images}", "dataset=folder", "dataset.image_size=16", "dataset.workers=2"]
    line += ["dataset.val_fraction=0.5", "train.batch_size=8", "train.max_steps=2", "backbone.width=4"]
    line += ["monitor.knn_every_epochs=1", "monitor.pictures=0", "launcher.threads=1", "run_dir=run"]
    ended = cli("ssl-train", *line)
    assert (ended.code, ended.err) == (0, "")
    assert len(stored) >= 3  # the training, and both splits of k-NN
    server = worker_server._server
    assert server is not None
    initialized.clear()
    ended = cli("ssl-eval", "run=run", "protocol=knn", "protocol.k=2", "workers=2", "baselines=false")
    assert (ended.code, ended.err) == (0, "")
    server.close()


def test_no_other_module_starts_processes_that_read_images() -> None:
    package = Path(worker_server.__file__).parents[1]
    starts = re.compile(r"DataLoader\(|os\.fork\(|\bmultiprocessing\b.*(Process|get_context|Pool)|ProcessPoolExecutor")
    found = {str(path.relative_to(package)) for path in package.rglob("*.py") if starts.search(path.read_text())}
    assert found == {"data/workers.py", "data/worker_server.py"}
