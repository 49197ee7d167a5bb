"""Runs of `ssl-train` in separate processes: start, wait, kill, compare."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from processes import PRELOAD
from sslcli.engine import checkpoint

SSL_TRAIN = str(Path(sys.executable).with_name("ssl-train"))
CLOCKS = ("wall", "train/images_per_s", "train/data_wait")
FOLDER_LINE = [  # a run on a folder of images, with a checkpoint after each step and without measurements
    "dataset.workers=0",
    "backbone.width=4",
    "train.batch_size=16",
    "train.save_every_steps=1",
    "monitor.knn_every_epochs=0",
    "monitor.pictures=0",
    "launcher.threads=1",
    "run_dir=run",
]
PATIENCE = 240.0  # seconds until a run counts as hanging


def make_folder(root: Path, *, per_class: int = 30, broken: int = 1) -> Path:
    """Two class folders of small noisy images, the first `broken` of the first class unreadable."""
    for number in range(2 * per_class):
        path = root / "ab"[number % 2] / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        generator = torch.Generator().manual_seed(number)
        pixels = torch.randint(0, 256, (20, 24, 3), generator=generator, dtype=torch.uint8) // (1 + number % 2)
        Image.fromarray(pixels.numpy()).save(path)
    for path in sorted((root / "a").iterdir())[:broken]:
        path.write_bytes(path.read_bytes()[:100])
    return root


class Started:
    """A started process. `code` is its exit code, negative for a signal, or None while it runs."""

    def __init__(self, pid: int, wait: Callable[[float], int | None]) -> None:
        self.pid, self.wait = pid, wait

    @property
    def code(self) -> int | None:
        return self.wait(0)

    def finish(self) -> int:
        """Wait for the end; return the exit code."""
        code = self.wait(PATIENCE)
        if code is None:
            for pid in [self.pid, *family(self.pid)]:
                os.kill(pid, signal.SIGKILL)
            raise TimeoutError(f"process {self.pid} did not end within {PATIENCE:g} s")
        return code


def start(*arguments: str, program: tuple[str, ...] = (SSL_TRAIN,), log: Path) -> Started:
    """Start `ssl-train ARGUMENTS` with one thread, in its own process group; append its output to `log`."""
    with log.open("ab") as file:
        process = subprocess.Popen(
            [*program, *arguments, "launcher.threads=1"],
            stdout=file,
            stderr=file,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )

    def wait(seconds: float) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
        return process.returncode

    return Started(process.pid, wait)


def start_warm(*arguments: str, log: Path, prepare: Callable[..., None] | None = None, given: Any = None) -> Started:
    """As `start`, but forked from a server that has imported everything, which saves seconds.

    The process calls `prepare(given)` first.
    """
    multiprocessing.set_forkserver_preload(PRELOAD)
    process = multiprocessing.get_context("forkserver").Process(
        target=ssl_train, args=([*arguments, "launcher.threads=1"], log, prepare, given)
    )
    process.start()
    assert process.pid is not None

    def wait(seconds: float) -> int | None:
        process.join(seconds)
        return process.exitcode

    return Started(process.pid, wait)


def start_ranks(
    *arguments: str, log: Path, prepare: Callable[[int], None] | None = None, other: tuple[str, ...] = ()
) -> list[Started]:
    """Start two processes of one run as an outer launcher does, each forked from the server of `start_warm`.

    Each calls `prepare(rank)` first; the second has the arguments `other` as well. Both print to `log`.
    """
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    return [
        start_warm(*arguments, *(other if rank else ()), log=log, prepare=become_rank, given=(rank, port, prepare))
        for rank in range(2)
    ]


def become_rank(given: tuple[int, int, Callable[[int], None] | None]) -> None:
    """Set the environment variables of an outer launcher."""
    rank, port, prepare = given
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if prepare is not None:
        prepare(rank)


def ssl_train(arguments: list[str], log: Path, prepare: Callable[..., None] | None, given: Any) -> None:
    """Run the console script in this process."""
    from sslcli.cli.train import main

    os.setsid()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    if prepare is not None:
        prepare(given)
    sys.argv = [SSL_TRAIN, *arguments]
    main()


def complete(process: Started, log: Path) -> None:
    """Wait for the end; fail unless the exit code is 0."""
    code = process.finish()
    assert code == 0, f"exit code {code}: {log.read_text()[-3000:]}"


def wait_for_step(process: Started, run_dir: Path, step: int) -> None:
    """Return once metrics.jsonl has `step`; fail if the run has ended before."""
    until = time.monotonic() + PATIENCE
    while last_step(run_dir) < step:
        assert process.code is None, f"the run ended by itself before step {step}, with code {process.code}"
        assert time.monotonic() < until, f"no step {step} after {PATIENCE:g} s"
        time.sleep(0.005)


def last_step(run_dir: Path) -> int:
    lines = metrics(run_dir)
    return int(lines[-1]["step"]) if lines else 0


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Return the complete lines of metrics.jsonl, without times."""
    path = run_dir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [{name: value for name, value in line.items() if name not in CLOCKS} for line in lines]


def newest(run_dir: Path) -> dict[str, Any]:
    """Return the newest checkpoint, without times and the configuration."""
    path = checkpoint.all_of(run_dir)[-1]
    state = checkpoint.load(path, device=torch.device("cpu"))
    del state["monitor"]["wall"], state["config"]
    return state


def differences(one: Any, other: Any, path: str = "") -> list[str]:
    """Return the paths at which two checkpoints differ; tensors must be bit-identical."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return [] if one.dtype == other.dtype and torch.equal(one, other) else [path]
    if isinstance(one, dict) and isinstance(other, dict):
        if one.keys() != other.keys():
            return [f"{path}: {sorted(map(str, one.keys() ^ other.keys()))}"]
        return [place for key in one for place in differences(one[key], other[key], f"{path}.{key}")]
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)) and len(one) == len(other):
        return [
            place for i, pair in enumerate(zip(one, other, strict=True)) for place in differences(*pair, f"{path}.{i}")
        ]
    return [] if one == other else [path]


def family(pid: int) -> list[int]:
    """Return the ids of all descendants of a process."""
    parents = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:  # it ended meanwhile
            continue
        if fields[0] != "Z":
            parents[int(status.parent.name)] = int(fields[1])
    found = [pid]
    for member in found:
        found += [child for child, parent in parents.items() if parent == member]
    return found[1:]


def survivors(pids: list[int], *, within: float) -> list[int]:
    """Return the processes that still run after `within` seconds."""
    until = time.monotonic() + within
    left = pids
    while left and time.monotonic() < until:
        time.sleep(0.02)
        left = [pid for pid in left if is_running(pid)]
    return left


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
