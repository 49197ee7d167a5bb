"""Processes that live for the whole test session, since starting one takes seconds."""

from __future__ import annotations

import multiprocessing
import pickle
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from sslcli.distributed import collectives

T = TypeVar("T")
PRELOAD = [
    "sslcli.cli.compose",
    "sslcli.runs.worker",
    "sslcli.engine.sharded_checkpoint",
    "torch._dynamo",
    "torch.utils.tensorboard",
]  # takes seconds
PATIENCE = 120.0  # seconds a task may take


class Pair:
    """Runs functions of importable modules on two processes joined by gloo, or `size` of them.

    A task that raises on one process leaves the others waiting inside a collective, so all are ended then, and the
    next task starts new ones.
    """

    def __init__(self, folder: Path, size: int = 2) -> None:
        self.folder, self.size = folder, size
        self.starts = 0
        self.workers: list[Any] = []
        self.pipes: list[Connection] = []

    def run(self, function: Callable[..., T], *args: Any) -> list[T]:
        """Run `function(*args)` on all processes at the same time; return the results by rank."""
        if not self.workers:
            self.start()
        for pipe in self.pipes:
            pipe.send_bytes(pickle.dumps((function, args)))
        answers: dict[int, T] = {}
        while len(answers) < self.size:
            waiting = [pipe for rank, pipe in enumerate(self.pipes) if rank not in answers]
            ready = wait(waiting, timeout=PATIENCE)
            if not ready:
                self.stop()
                raise TimeoutError(f"{function.__name__} took more than {PATIENCE:g} s on {self.size} processes")
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = self.pipes.index(pipe)
                try:
                    error, answers[rank] = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    error = "it died"
                if error:
                    self.stop()
                    raise AssertionError(f"process {rank} of {self.size}: {error}")
        return [answers[rank] for rank in range(self.size)]

    def start(self) -> None:
        multiprocessing.set_forkserver_preload(PRELOAD)
        context = multiprocessing.get_context("forkserver")
        rendezvous = self.folder / f"rendezvous{self.starts}"
        self.starts += 1
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            worker = context.Process(target=serve, args=(rank, self.size, rendezvous, theirs), daemon=True)
            worker.start()
            theirs.close()  # so that its death is an end of file in this process
            self.workers.append(worker)
            self.pipes.append(ours)

    def stop(self) -> None:
        for worker in self.workers:
            worker.kill()
            worker.join()
        for pipe in self.pipes:
            pipe.close()
        self.workers.clear()
        self.pipes.clear()


def serve(rank: int, size: int, rendezvous: Path, pipe: Connection) -> None:
    """Run tasks until the pipe closes."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size, timeout=timedelta(seconds=PATIENCE)
    )
    while True:
        try:
            function, args = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        torch.manual_seed(0)
        try:
            answer = (None, function(*args))
        except Exception:
            answer = (traceback.format_exc(), None)
        pipe.send_bytes(pickle.dumps(answer))


def my_half(rows: Tensor) -> Tensor:
    """Return the contiguous part of a global batch that belongs to this process."""
    return rows.chunk(collectives.world_size())[collectives.rank()].clone()
