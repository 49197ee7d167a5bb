"""Runs of `ssl-train` as processes of their own: started, watched, killed, compared."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image

SSL_TRAIN = str(Path(sys.executable).with_name("ssl-train"))
CLOCKS = ("wall", "train/images_per_s", "train/data_wait")
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


def start(*arguments: str, program: tuple[str, ...] = (SSL_TRAIN,), log: Path) -> subprocess.Popen[bytes]:
    """`ssl-train ARGUMENTS` with one thread, in a process group of its own; what it prints is appended to `log`."""
    with log.open("ab") as file:
        return subprocess.Popen(
            [*program, *arguments, "launcher.threads=1"],
            stdout=file,
            stderr=file,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )


def finish(process: subprocess.Popen[bytes]) -> int:
    """Wait for the end; the exit code."""
    try:
        return process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise


def complete(*arguments: str, program: tuple[str, ...] = (SSL_TRAIN,), log: Path) -> None:
    """Run to the end, which must be a good one."""
    code = finish(start(*arguments, program=program, log=log))
    assert code == 0, f"exit code {code}: {log.read_text()[-3000:]}"


def wait_for_step(process: subprocess.Popen[bytes], run_dir: Path, step: int) -> None:
    """Return once metrics.jsonl has `step` and the run is still at work."""
    until = time.monotonic() + PATIENCE
    while last_step(run_dir) < step:
        assert process.poll() is None, f"the run ended by itself before step {step}, with code {process.returncode}"
        assert time.monotonic() < until, f"no step {step} after {PATIENCE:g} s"
        time.sleep(0.005)


def last_step(run_dir: Path) -> int:
    lines = metrics(run_dir)
    return int(lines[-1]["step"]) if lines else 0


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl, without what a clock decides."""
    path = run_dir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [{name: value for name, value in line.items() if name not in CLOCKS} for line in lines]


def newest(run_dir: Path) -> dict[str, Any]:
    """The newest checkpoint, without what a clock or the place of the run decides."""
    path = sorted((run_dir / "checkpoints").glob("step-*.pt"))[-1]
    state: dict[str, Any] = torch.load(path, weights_only=True)
    del state["watch"]["wall"], state["config"]
    return state


def differences(one: Any, other: Any, path: str = "") -> list[str]:
    """Where two checkpoints differ; tensors must be equal bit for bit."""
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
    """The processes a process started, and those that they started."""
    parents = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:  # it ended while we looked
            continue
        if fields[0] != "Z":
            parents[int(status.parent.name)] = int(fields[1])
    found = [pid]
    for member in found:
        found += [child for child, parent in parents.items() if parent == member]
    return found[1:]


def survivors(pids: list[int], *, within: float) -> list[int]:
    """Which of these processes still run after `within` seconds."""
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
