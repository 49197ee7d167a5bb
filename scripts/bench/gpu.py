"""Benchmark of sslcli on a GPU, run by `make gpu-bench ROWS=...` and, with six short rows, by `make gpu`.

    python scripts/bench/gpu.py "step/simclr/*" loader/8_workers [--device cpu]

Each measurement runs in a new process, and the sides (libraries) of a row alternate. A row takes at most 90 seconds,
and its sides share this time. The results are written after every measurement: gpu.json has all of them, gpu.md the
table. The same command continues an interrupted benchmark, and measures nothing again that is in gpu.json. With
`--device cpu`, all rows have toy sizes, to test this script without a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Sequence
from datetime import date
from fnmatch import fnmatch
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from gpu_rows import PACKAGES, ROWS, SHORT
from gpu_sides import photos
from gpu_table import table
from gpu_timing import Plan
from measure import ALLOCATOR_ENV

from sslcli.system import atomic
from sslcli.system.cpu import usable

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
VERSIONS = ("torch", "torchvision", "triton", "lightly", "nvidia-dali-cuda120", "nvidia-dali-cuda130")
EXIT_CONFIG, EXIT_INTERRUPTED = 2, 130
REMEDY = "choose another directory with OUT=... (--out)"
RESERVE = 3.0  # seconds to end a process, which the time of a measurement does not include


class Refused(Exception):
    """The command line or the output directory is invalid. The message states the remedy."""


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", help='names of rows, or patterns such as "step/simclr/*"')
    parser.add_argument("--short", action="store_true", help="the six rows of `make gpu`")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--seconds", type=float, default=90.0, help="maximum time of a row (default: %(default)g)")
    parser.add_argument("--repeats", type=int, default=2, help="maximum processes per side (default: %(default)s)")
    parser.add_argument("--sides", nargs="*", default=[], help="measure only these sides, such as sslcli")
    parser.add_argument("--out", type=Path, help="directory of gpu.json and gpu.md (default: in runs/gpu_bench)")
    options = parser.parse_args(arguments)
    try:
        names = SHORT if options.short else matching(options.rows)
        if options.device == "cuda" and not torch.cuda.is_available():
            raise Refused(
                "there is no CUDA device: use a machine with a GPU, or toy sizes with DEVICE=cpu (--device cpu)"
            )
        facts = environment(options.device)
        out = options.out or REPOSITORY / "runs" / "gpu_bench" / f"{options.device}-{facts['code']}"
        results = Results(out, facts, " ".join(["gpu.py", *arguments]))
        run_rows(names, results, options)
    except Refused as error:
        print(f"gpu.py: {error}", file=sys.stderr)
        return EXIT_CONFIG
    except KeyboardInterrupt:
        print("gpu.py: interrupted: run the same command again to continue", file=sys.stderr)
        return EXIT_INTERRUPTED
    print("\n".join(table(results.content, names)))
    print(f"\nwritten to {out}")
    return 0


def matching(patterns: Sequence[str]) -> list[str]:
    """Return the names of the rows that match a pattern. Raises Refused if a pattern matches no row."""
    unknown = [pattern for pattern in patterns if not any(fnmatch(name, pattern) for name in ROWS)]
    if unknown or not patterns:
        why = f"there is no row {', '.join(unknown)}" if unknown else "no rows are given"
        raise Refused(f"{why}: choose from these rows, or patterns such as 'step/simclr/*':\n" + "\n".join(ROWS))
    return [name for name in ROWS if any(fnmatch(name, pattern) for pattern in patterns)]


def environment(device: str) -> dict[str, Any]:
    """Return machine, versions, commit and date; `code` is a checksum of the code of sslcli and of the benchmark."""
    machine = {"cpu": platform.processor() or platform.machine(), "cores": len(usable()), "system": platform.platform()}
    if device == "cuda":
        machine |= {
            "gpu": torch.cuda.get_device_name(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    found = {"python": platform.python_version()}
    for package in VERSIONS:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True)
    code = 0
    for folder in ("sslcli", "conf", "scripts/bench"):
        for path in sorted((REPOSITORY / folder).rglob("*")):
            if path.suffix in (".py", ".yaml", ".c"):
                code = zlib.crc32(path.read_bytes(), code)
    commit = git.stdout.strip() or "unknown"
    return {"machine": machine, "versions": found, "commit": commit, "code": f"{code:08x}", "date": str(date.today())}


class Results:
    """The results of a directory, which are written after every change. Raises Refused if they cannot be added to."""

    def __init__(self, out: Path, facts: dict[str, Any], command: str) -> None:
        self.out = out
        self.content: dict[str, Any] = facts | {"commands": [], "finished": [], "left_out": {}, "results": []}
        path = out / "gpu.json"
        if path.is_file():
            self.content |= json.loads(path.read_text())
            known = {name: self.content["versions"].get(name, value) for name, value in facts["versions"].items()}
            pairs = {name: (self.content[name], facts[name]) for name in ("machine", "code")}
            pairs["versions"] = (known, facts["versions"])  # a library that was installed meanwhile is no change
            if changed := [name for name, (stored, current) in pairs.items() if stored != current]:
                raise Refused(f"{path} has results of other {' and '.join(changed)}: {REMEDY}")
            self.content["versions"] |= facts["versions"]
        if command not in self.content["commands"]:
            self.content["commands"].append(command)
        self.write()

    def write(self) -> None:
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            atomic.replace(self.out / "gpu.json", json.dumps(self.content, indent=1).encode())
            atomic.replace(self.out / "gpu.md", "\n".join(table(self.content, list(ROWS))).encode())
        except OSError as error:
            raise Refused(f"{self.out} cannot be written ({error.strerror}): {REMEDY}") from error

    def has(self, row: str, side: str, number: int) -> bool:
        return any((r["row"], r["side"], r["process"]) == (row, side, number) for r in self.content["results"])

    def add(self, result: dict[str, Any]) -> None:
        self.content["results"].append(result)
        self.write()

    def finish(self, row: str, left_out: Sequence[str]) -> None:
        self.content["finished"] = sorted({*self.content["finished"], row})
        self.content["left_out"] |= {side: f"{PACKAGES[side]} is not installed" for side in left_out}
        self.write()


def run_rows(names: Sequence[str], results: Results, options: argparse.Namespace) -> None:
    """Measure the rows that are not finished."""
    with tempfile.TemporaryDirectory(prefix="sslcli-bench-") as folder:
        os.environ.setdefault("BENCH_FOLDER", folder)
        for name in names:
            wanted = [side for side in ROWS[name].sides if not options.sides or side in options.sides]
            left_out = [side for side in wanted if not is_installed(side)]
            sides = [side for side in wanted if side not in left_out]
            if name in results.content["finished"] and all(results.has(name, side, 0) for side in sides):
                continue
            if ROWS[name].needs_files:
                print("generating JPEG files", file=sys.stderr, flush=True)
                photos(Plan(torch.device(options.device), 0.0, 0, 0, 0))  # before the time of the row begins
            run_row(name, sides, results, options)
            results.finish(name, left_out)


def is_installed(side: str) -> bool:
    try:
        return side not in PACKAGES or find_spec(PACKAGES[side]) is not None
    except ModuleNotFoundError:  # the parent package is missing
        return False


def run_row(name: str, sides: Sequence[str], results: Results, options: argparse.Namespace) -> None:
    """Measure the sides of a row alternately. Every side runs once; another round needs the time of the first round."""
    deadline = time.monotonic() + options.seconds
    for number in range(options.repeats):
        start = time.monotonic()
        order = list(sides) if number % 2 == 0 else list(sides)[::-1]
        for position, side in enumerate(order):
            if not results.has(name, side, number):
                limit = (deadline - time.monotonic()) / (len(order) - position)
                results.add(
                    {"row": name, "side": side, "process": number, **measure(name, side, limit, options.device)}
                )
        if time.monotonic() + (time.monotonic() - start) > deadline:
            return


def measure(name: str, side: str, limit: float, device: str) -> dict[str, Any]:
    """Measure a side of a row in a new process, which is killed after `limit` seconds. Return its result or error."""
    print(f"{name} / {side}: ", end="", file=sys.stderr, flush=True)
    settings = {"GPU_BENCH_DEVICE": device, "GPU_BENCH_SECONDS": str(max(0.0, 0.6 * (limit - RESERVE)))}
    allocator = ALLOCATOR_ENV if side.endswith("best") else {}
    process = subprocess.Popen(
        [sys.executable, "gpu_rows.py", f"{name}/{side}"],
        cwd=HERE,
        env=os.environ | allocator | settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=max(1.0, limit - RESERVE))
    except subprocess.TimeoutExpired:
        found: dict[str, Any] = {"error": f"it takes more than {limit:.0f} s"}
    else:
        found = json.loads(out.splitlines()[-1]) if process.returncode == 0 else {"error": last_line(err)}
    finally:
        end(process)
    print(json.dumps(found), file=sys.stderr, flush=True)
    return found


def end(process: subprocess.Popen[str]) -> None:
    """Kill a process and all processes that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
