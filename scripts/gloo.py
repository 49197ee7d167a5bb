"""Several processes on this machine, joined by gloo: what the scripts beside it measure with."""

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
IMPORTED = ["sslcli.cli.compose", "sslcli.runs.worker", "torch._dynamo", "torch.utils.tensorboard"]


def together(size: int, function: Callable[..., T], *args: Any, patience: float = 3600.0) -> list[T]:
    """`function(*args)` on `size` processes with one thread each; what each returned, by rank.

    `function` belongs to an importable module. Raises RuntimeError with the traceback of the first process that
    failed, and TimeoutError where none answers for `patience` seconds; either ends all of them.
    """
    multiprocessing.set_forkserver_preload(IMPORTED)
    context = multiprocessing.get_context("forkserver")
    with tempfile.TemporaryDirectory() as folder:
        workers, pipes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            worker = context.Process(
                target=_serve, args=(Path(folder) / "meeting", rank, size, theirs, function, args), daemon=True
            )
            worker.start()
            theirs.close()  # so that its death is an end of file here
            workers.append(worker)
            pipes.append(ours)
        try:
            return _answers(pipes, patience)
        finally:
            for worker in workers:
                worker.kill()
                worker.join()


def _answers(pipes: list[Connection], patience: float) -> list[Any]:
    answers: dict[int, Any] = {}
    while len(answers) < len(pipes):
        ready = wait([pipe for rank, pipe in enumerate(pipes) if rank not in answers], timeout=patience)
        if not ready:
            raise TimeoutError(f"no process answered for {patience:g} s")
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = pipes.index(pipe)
            try:
                error, answers[rank] = pickle.loads(pipe.recv_bytes())
            except EOFError:
                error = "it died"
            if error:
                raise RuntimeError(f"process {rank} of {len(pipes)}: {error}")
    return [answers[rank] for rank in range(len(pipes))]


def _serve(
    meeting: Path, rank: int, size: int, pipe: Connection, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if size > 1:
        limit = timedelta(hours=1)
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size, timeout=limit)
    try:
        answer = (None, function(*args))
    except Exception:
        answer = (traceback.format_exc(), None)
    pipe.send_bytes(pickle.dumps(answer))  # by value: torch's own way ends with this process
