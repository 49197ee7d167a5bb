"""Functions of the other scripts in several processes on this machine, connected by gloo."""

from __future__ import annotations

import multiprocessing
import pickle
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")
PRELOADED = ["sslcli.cli.compose", "sslcli.runs.worker", "torch._dynamo", "torch.utils.tensorboard"]


def run_processes(size: int, function: Callable[..., T], *args: Any, timeout: float = 3600.0) -> list[T]:
    """Run `function(*args)` in `size` processes with one thread each, and return the results by rank.

    `function` must be importable. Raise RuntimeError with the traceback of the first process that fails, and
    TimeoutError if no process returns for `timeout` seconds. All processes are killed in any case.
    """
    multiprocessing.set_forkserver_preload(PRELOADED)
    context = multiprocessing.get_context("forkserver")
    with tempfile.TemporaryDirectory() as folder:
        workers, pipes = [], []
        for rank in range(size):
            parent_end, child_end = context.Pipe()
            worker = context.Process(
                target=_run_rank, args=(Path(folder) / "rendezvous", rank, size, child_end, function, args), daemon=True
            )
            worker.start()
            child_end.close()  # so that recv raises EOFError here when the child process ends
            workers.append(worker)
            pipes.append(parent_end)
        try:
            return _results(pipes, timeout)
        finally:
            for worker in workers:
                worker.kill()
                worker.join()


def _results(pipes: list[Connection], timeout: float) -> list[Any]:
    """Wait for the results of all processes and return them by rank."""
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        ready = wait([pipe for rank, pipe in enumerate(pipes) if rank not in results], timeout=timeout)
        if not ready:
            raise TimeoutError(f"no process returned within {timeout:g} s")
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = pipes.index(pipe)
            try:
                error, results[rank] = pickle.loads(pipe.recv_bytes())
            except EOFError:
                error = "it ended without a result"
            if error:
                raise RuntimeError(f"process {rank} of {len(pipes)}: {error}")
    return [results[rank] for rank in range(len(pipes))]


def _run_rank(
    rendezvous: Path, rank: int, size: int, pipe: Connection, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    """Join the process group as `rank`, run the function, and send (traceback or None, result) through the pipe."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if size > 1:
        limit = timedelta(hours=1)
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size, timeout=limit)
    try:
        result = (None, function(*args))
    except Exception:
        result = (traceback.format_exc(), None)
    pipe.send_bytes(pickle.dumps(result))  # pickle the values: tensors in shared memory would end with this process
